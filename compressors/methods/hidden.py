"""Hidden size: fewer dimensions of the residual stream, the same ones everywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from compressors.calibration import Calibration
from compressors.checkpoint import Checkpoint, LazyTensor
from compressors.errors import InfeasiblePlan
from compressors.family import Family, head_dim


def choose(hidden_size: int, keep: int, calibration: Calibration | None) -> torch.Tensor:
    """The dimensions that stay, int64 [keep], ascending: those of the largest activity in the residual stream
    (Minitron, https://arxiv.org/abs/2407.14679); without a calibration the first.
    """
    if not 1 <= keep <= hidden_size:
        raise InfeasiblePlan(
            f"hidden_size: {keep} of {hidden_size} dimensions can't stay; choose from 1 to {hidden_size}"
        )
    if calibration is None:
        return torch.arange(keep)
    return torch.topk(calibration.hidden_activity, keep).indices.sort().values


def cut(
    checkpoint: Checkpoint, family: Family, kept: torch.Tensor, mean_square: list[torch.Tensor] | None
) -> Checkpoint:
    """Keep these dimensions S in every weight that reads from or writes to the residual stream.

    An RMSNorm divides by the root mean square of what it sees, which is another over S than over all dimensions. Its
    gain is corrected by √(mean(x_S²) / mean(x²)), x² from the calibration text, before a block (Llama) as after it
    (EXAONE).

    mean_square: of the inputs of `family.residual_norms`, in that order, [E] each; None: gains are cut uncorrected.
    """
    config = dict(checkpoint.config)
    layers = int(config["num_hidden_layers"])
    if len(kept) == int(config["hidden_size"]):
        return checkpoint
    tensors = dict(checkpoint.tensors)
    for layer in range(layers):
        for part in (family.q, family.k, family.v, family.gate, family.up):
            _take(tensors, family.in_layer(layer, part), 1, kept)
        for part in (family.o, family.down):
            _take(tensors, family.in_layer(layer, part), 0, kept)
    for place, name in enumerate(family.residual_norms(layers)):
        _take(tensors, name, 0, kept)
        if mean_square is not None:
            squares = mean_square[place].double()  # (E)
            if squares.any():  # a block that puts out nothing has nothing to correct
                factor = float((squares[kept].mean() / squares.mean()).sqrt())
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"].map(_scaled(factor))
    _take(tensors, family.embedding, 1, kept)
    if f"{family.lm_head}.weight" in tensors:
        _take(tensors, family.lm_head, 1, kept)
    config["head_dim"] = head_dim(config)  # no longer hidden_size / num_attention_heads
    config["hidden_size"] = len(kept)
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


def _take(tensors: dict[str, LazyTensor], module: str, dim: int, kept: torch.Tensor) -> None:
    tensors[f"{module}.weight"] = tensors[f"{module}.weight"].take(dim, kept)


def _scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gain: (gain.float() * factor).to(gain.dtype)
