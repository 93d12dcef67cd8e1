"""Which projections lose the most when they are quantised, in closed form from the second moments of their inputs.

Symbols: N output and K input width of a Linear, H = E[x xᵀ] the second moment of its input, ΔW what rounding changes.
Knows no plan: it orders, and whoever asks keeps as many as wanted in 16 bits.
"""

from __future__ import annotations

import math

import torch

from compressors import rounding
from compressors.checkpoint import Checkpoint
from compressors.family import Family
from compressors.methods import precision

BITS = {"W8A8": 8, "FP8_DYNAMIC": 8, "W4A16": 4}
FP8_ERROR = 2**-6 / 12 * 0.541  # mean square relative error of rounding to 3 bits of mantissa, magnitudes log-uniform


def rank(
    checkpoint: Checkpoint,
    family: Family,
    scheme: str,
    moments: precision.Moments,
    *,
    quantizer: str = "nearest",
    group_size: int = 0,
) -> list[tuple[str, ...]]:
    """The fused projections of every layer, those first whose quantization does the most damage per byte that it saves.

    The arguments are those of `precision.quantize`. One weight at a time is in memory. Raises InfeasiblePlan.
    """
    size = precision.group_size(checkpoint, family, group_size) if scheme == "W4A16" else None
    checkpoint = precision.in_16_bits(checkpoint)
    found = []
    for parts in precision.fused_groups(checkpoint, family):
        lost = saved = 0.0
        for module in parts:
            weight = checkpoint.tensors[f"{module}.weight"].load()
            lost += damage(weight, moments(module), scheme, size, quantizer)
            saved += weight.numel() * (16 - BITS[scheme] - 16 / (size or weight.shape[1])) / 8
        found.append((lost / saved, parts))
    return [parts for _, parts in sorted(found, key=lambda pair: -pair[0])]


def damage(
    weight: torch.Tensor, moment: torch.Tensor, scheme: str, size: int | None, quantizer: str = "nearest"
) -> float:
    """The squared error of the output relative to the output, tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), rounded inputs included."""
    values, scales = precision.quantised_weight(weight, scheme, size, quantizer, moment)
    exact = weight.to(moment.device).float()
    error = rounding.multiplied_out(values, scales).to(moment.device) - exact
    moment = moment.float()
    lost = float(((error @ moment) * error).sum()) + _lost_to_inputs(exact, moment.diagonal(), scheme)
    return lost / max(float(((exact @ moment) * exact).sum()), torch.finfo(torch.float32).tiny)


def _lost_to_inputs(weight: torch.Tensor, square: torch.Tensor, scheme: str) -> float:
    """What rounding the inputs per token adds, expected; square [K]: their mean squares.

    int8: a step is the largest of a token's inputs over 127.5; that is the largest channel, or chance's largest of K.
    """
    by_input = weight.square().sum(dim=0)  # (K,)
    if scheme == "FP8_DYNAMIC":
        return FP8_ERROR * float((by_input * square).sum())
    if scheme == "W8A8":
        largest = max(float(square.max()), 2 * math.log(len(square)) * float(square.mean()))
        return largest / 127.5**2 / 12 * float(by_input.sum())
    return 0.0
