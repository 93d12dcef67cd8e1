"""Fit a distillation to its device: windows at a time, activations kept or computed twice, layers compiled or not.

Symbols: T tokens of a window, E hidden size. Knows no text and no schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from compressors.distillation import loss as distill_loss
from compressors.distillation.pair import Pair, last_hidden

MOST_TOKENS = 16384  # the most tokens of a micro-batch: a GPU gains nothing from more
FEWEST_TOKENS = 4096  # with fewer tokens in a micro-batch, activations are computed twice instead
CPU_TOKENS = 512  # the tokens of a micro-batch on a CPU: a second's work for a small model
CHUNK_TENSORS = 10  # the tensors [chunk, V] in float32 that the loss holds at once where it is not compiled
SHARE_OF_MEMORY = 0.85  # the share of the free memory to use


def divisor(of: int, most: int) -> int:
    """Return the largest divisor of `of` up to `most`, so that all batches have one size and are compiled once."""
    return next(size for size in range(max(min(of, most), 1), 0, -1) if of % size == 0)


def fit(
    pair: Pair, window: torch.Tensor, batch: int, chunk: int, again: bool | None, micro: int | None
) -> tuple[int, bool]:
    """Return (the windows of a micro-batch, whether to compute activations twice), as memory allows.

    On a GPU both follow from what one window's activations take. Elsewhere the micro-batch follows from CPU_TOKENS, and
    nothing is computed twice unless `again` asks for it.

    Args:
        pair: Both models.
        window: One window of token ids [T].
        batch: The windows of a batch.
        chunk: The number of positions whose logits are held at once.
        again: Whether to compute activations twice; None: where memory requires it.
        micro: The wanted windows of a micro-batch; None: as memory allows.
    """
    length = len(window)
    if not pair.device.startswith("cuda"):
        return divisor(batch, micro or CPU_TOKENS // length), bool(again)
    of_window = saved_bytes(pair, window)
    layers = len(pair.layers[0])
    width = int(pair.student.config.hidden_size)
    twice = of_window // layers + layers * length * width * pair.dtype.itemsize
    parameters = sum(master.numel() for master in pair.masters.values())
    logits = CHUNK_TENSORS * chunk * int(pair.student.config.vocab_size) * 4
    free = (
        torch.cuda.mem_get_info(pair.device)[0]
        + torch.cuda.memory_reserved(pair.device)
        - torch.cuda.memory_allocated(pair.device)
    )
    left = free * SHARE_OF_MEMORY - 3 * 4 * parameters - logits  # gradients and both moments
    if again is None:
        again = left < of_window * min(batch, -(-FEWEST_TOKENS // length))
    fitting = int(left // (twice if again else of_window))
    return divisor(batch, micro or min(fitting, MOST_TOKENS // length)), again


def saved_bytes(pair: Pair, window: torch.Tensor) -> int:
    """Return the bytes that the student keeps of one window [T] until its backward pass, weights not counted."""
    of_student = (*pair.student.parameters(), *pair.student.buffers())
    weights = {tensor.untyped_storage().data_ptr() for tensor in of_student}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # the graph keeps saved tensors alive, so that no address is used twice
        hidden = last_hidden(pair.student, window[None].to(pair.device))
    del hidden
    return sum(sizes.values())


def set_layers(pair: Pair, *, twice: bool, compiled: bool) -> None:
    """Set how the layers of both models run from now on.

    Args:
        pair: Both models.
        twice: Whether to use gradient checkpointing: each of the student's layers keeps only its input for the backward
            pass.
        compiled: Whether torch.compile fuses what lies between the matrix products, layer by layer, so that one
            compiled layer serves for all.
    """
    if compiled:  # one graph per model, use of gradients, kind of layer, and number of windows
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layers, again in zip(pair.layers, (twice, False), strict=True):
        for layer in layers:
            forward: Callable[..., Any] = type(layer).forward.__get__(layer)
            if compiled:
                forward = torch.compile(forward, dynamic=False)
            if again:
                forward = functools.partial(
                    run_again_in_backward, forward, use_reentrant=False, preserve_rng_state=False
                )
            layer.forward = forward
    plain = distill_loss.loss_and_gradient
    pair.of_chunk = torch.compile(plain, dynamic=False) if compiled else plain
