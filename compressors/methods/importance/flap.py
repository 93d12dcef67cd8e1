"""Fluctuation (H[j, j] − μ[j]²) ‖W[:, j]‖² of an input: FLAP, https://arxiv.org/abs/2312.11983."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressors.methods.heads import Kept, choose, without
from compressors.methods.importance import HeadCounts, Reader
from compressors.statistics.second_moments import Moment


def fluctuation(weight: torch.Tensor, moment: Moment) -> torch.Tensor:
    """Return the fluctuation of each input of `weight` [N, K]: float64 [K]."""
    variance = (moment.second.diagonal().double() - moment.mean.double().square()).clamp_min(0.0)
    return variance * weight.double().square().sum(0)


def channels(reader: Reader, keep: int) -> torch.Tensor:
    """Keep the channels of the largest fluctuation."""
    return torch.topk(fluctuation(reader.weight, reader.moment), keep).indices.sort().values


def heads(reader: Reader, counts: HeadCounts, gone: Sequence[int] | None = None) -> Kept:
    """Keep the heads of the largest root of their inputs' summed fluctuation."""
    of_inputs = fluctuation(reader.weight, reader.moment).reshape(counts.heads, counts.size)
    of_groups = None if gone is None else without(counts.groups, gone)
    of_heads = of_inputs.sum(1).sqrt().tolist()
    return choose(counts.heads, counts.groups, counts.keep_heads, counts.keep_groups, of_heads, of_groups)
