"""Cut the hidden size: keep fewer dimensions of the residual stream, the same ones in every layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from compressors.errors import InfeasiblePlan
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family, head_dim, take_columns, take_rows
from compressors.statistics.activations import Calibration


def choose(hidden_size: int, keep: int, calibration: Calibration | None) -> torch.Tensor:
    """Return the kept dimensions, int64 [keep], ascending: those of the largest activity in the residual stream.

    Minitron, https://arxiv.org/abs/2407.14679. Without a calibration the first are kept, which are the largest
    components of a rotated model (`compressors.methods.rotation`).

    Raises:
        InfeasiblePlan: When `keep` is not from 1 to `hidden_size`.
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
    """Keep the dimensions S in every weight that reads from or writes to the residual stream.

    An RMSNorm divides by the root mean square of its input, which is another over S than over all dimensions. Its gain
    is corrected by √(mean(x_S²) / mean(x²)), with x² from the calibration text, before a block (Llama) as after it
    (EXAONE). An embedding that is multiplied by √E is scaled to keep its size. If it is also the lm_head, the final
    norm's gain undoes that.

    Args:
        checkpoint: The model.
        family: Its family.
        kept: S, int64 [kept].
        mean_square: x² [E] of the inputs of `family.residual_norms`, in that order; None: gains are not corrected.
    """
    config = dict(checkpoint.config)
    layers, width = int(config["num_hidden_layers"]), int(config["hidden_size"])
    if len(kept) == width:
        return checkpoint
    tensors = dict(checkpoint.tensors)
    factors: dict[str, float] = {}  # by norm, for its gains
    for layer in range(layers):
        for part in (family.q, family.k, family.v, family.gate, family.up):
            take_columns(tensors, family.in_layer(layer, part), kept)
        for part in (family.o, family.down):
            take_rows(tensors, family.in_layer(layer, part), kept)
    for place, name in enumerate(family.residual_norms(layers)):
        take_rows(tensors, name, kept)
        if mean_square is not None:
            squares = mean_square[place].double()  # (E)
            if squares.any():  # a block whose output is all zeros needs no correction
                factors[name] = float((squares[kept].mean() / squares.mean()).sqrt())
    take_columns(tensors, family.embedding, kept)
    untied = f"{family.lm_head}.weight" in tensors
    if untied:
        take_columns(tensors, family.lm_head, kept)
    if family.scaled_embedding:
        larger = math.sqrt(width / len(kept))
        embedding = f"{family.embedding}.weight"
        tensors[embedding] = tensors[embedding].map(_scaled(larger, 0.0))
        if not untied:
            factors[family.final_norm] = factors.get(family.final_norm, 1.0) / larger
    for name, factor in factors.items():
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].map(_scaled(factor, family.norm_offset))
    config["head_dim"] = head_dim(config)  # no longer hidden_size / num_attention_heads
    config["hidden_size"] = len(kept)
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


def _scaled(factor: float, offset: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that scales the gain weight + offset by the factor, and returns it as a weight."""
    return lambda weight: ((weight.float() + offset) * factor - offset).to(weight.dtype)
