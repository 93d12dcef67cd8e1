"""What inputs add to the output, E‖W[:, P] x_P‖² = tr(W[:, P] H[P, P] W[:, P]ᵀ): lost when the inputs P go."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressors.methods.heads import Kept, choose, without
from compressors.methods.importance import HeadCounts, Reader
from compressors.statistics.second_moments import Moment


def energy(weight: torch.Tensor, moment: Moment, size: int = 1) -> torch.Tensor:
    """Return the energy of each block of `size` inputs of `weight` [N, K]: float64 [K / size]."""
    rows, width = weight.shape
    blocks = weight.double().reshape(rows, -1, size)  # (N, K / size, size)
    second = moment.second.reshape(width // size, size, width // size, size)
    own = second.diagonal(dim1=0, dim2=2).double()  # (size, size, K / size); doubled, all of H is large
    return torch.einsum("nki,ijk,nkj->k", blocks, own, blocks).clamp_min(0.0)


def channels(reader: Reader, keep: int) -> torch.Tensor:
    """Keep the channels of the largest energy."""
    return torch.topk(energy(reader.weight, reader.moment), keep).indices.sort().values


def heads(reader: Reader, counts: HeadCounts, gone: Sequence[int] | None = None) -> Kept:
    """Keep the groups whose heads together add the most, and in each the query heads that add the most."""
    each = counts.size * counts.heads // counts.groups
    of_groups = energy(reader.weight, reader.moment, each).tolist() if gone is None else without(counts.groups, gone)
    of_heads = energy(reader.weight, reader.moment, counts.size).tolist()
    return choose(counts.heads, counts.groups, counts.keep_heads, counts.keep_groups, of_heads, of_groups)
