"""Mean activity on the calibration text: Minitron, https://arxiv.org/abs/2407.14679, section 2.2."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressors.methods.heads import Kept, choose, without
from compressors.methods.importance import HeadCounts, Reader


def channels(reader: Reader, keep: int) -> torch.Tensor:
    """Keep the channels of the largest activity; the first ones where it is not known."""
    if reader.activity is None:
        return torch.arange(keep)
    return torch.topk(reader.activity, keep).indices.sort().values


def heads(reader: Reader, counts: HeadCounts, gone: Sequence[int] | None = None) -> Kept:
    """Keep the groups of the largest sum of squared activity, and in each its most active query heads."""
    activity = [0.0] * counts.heads if reader.activity is None else reader.activity.tolist()
    of_groups = None if gone is None else without(counts.groups, gone)
    return choose(counts.heads, counts.groups, counts.keep_heads, counts.keep_groups, activity, of_groups)
