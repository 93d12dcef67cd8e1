"""Removes attention heads: key/value heads with their groups of query heads, and query heads within each group.

With H query and G key/value heads, query head h reads key/value head h // (H / G). So every group keeps the same number
of query heads, in their order. Each layer may keep other heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from compressors.errors import InfeasiblePlan
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family, head_dim, take_columns, take_rows

Kept = tuple[tuple[int, tuple[int, ...]], ...]  # a layer's pairs (key/value head, its query heads), ascending


def choose(
    heads: int,
    groups: int,
    keep_heads: int,
    keep_groups: int,
    activity: Sequence[float],
    of_groups: Sequence[float] | None = None,
) -> Kept:
    """Return the heads that stay in a layer.

    The groups with the largest energy (sum of squared activity) stay, and in each group its most active query heads.
    This is Minitron's head importance, https://arxiv.org/abs/2407.14679.

    Args:
        heads: The number of query heads, H.
        groups: The number of key/value heads, G.
        keep_heads: The number of query heads that stay.
        keep_groups: The number of key/value heads that stay.
        activity: The activity of each query head [H].
        of_groups: Another measure of the groups [G], in place of their energy.

    Raises:
        InfeasiblePlan: These numbers of heads can't be kept, see `infeasible`.
    """
    reason = infeasible(heads, groups, keep_heads, keep_groups)
    if reason:
        raise InfeasiblePlan(reason)
    per_group, keep_each = heads // groups, keep_heads // keep_groups

    def members(group: int) -> list[int]:
        return list(range(group * per_group, (group + 1) * per_group))

    kept = []
    if of_groups is None:
        of_groups = [sum(activity[h] ** 2 for h in members(group)) for group in range(groups)]
    for group in _largest(of_groups, keep_groups):
        best = _largest([activity[h] for h in members(group)], keep_each)
        kept.append((group, tuple(group * per_group + place for place in best)))
    return tuple(kept)


def infeasible(heads: int, groups: int, keep_heads: int, keep_groups: int) -> str | None:
    """Return why `keep_heads` query and `keep_groups` key/value heads can't be kept, or None."""
    if not 1 <= keep_groups <= groups:
        return f"heads: {keep_groups} key/value heads can't be kept of {groups}; choose from 1 to {groups}"
    if not 1 <= keep_heads <= heads:
        return f"heads: {keep_heads} query heads can't be kept of {heads}; choose from 1 to {heads}"
    if keep_heads % keep_groups:
        return (
            f"heads: {keep_heads} query heads can't be shared by {keep_groups} key/value heads; "
            f"choose a multiple of {keep_groups}"
        )
    if keep_heads // keep_groups > heads // groups:
        return (
            f"heads: {keep_heads} query heads on {keep_groups} key/value heads are "
            f"{keep_heads // keep_groups} each, and "
            f"the model has {heads // groups}; choose at most {keep_groups * (heads // groups)} query heads"
        )
    return None


def cut(checkpoint: Checkpoint, family: Family, kept: Sequence[Kept]) -> Checkpoint:
    """Keep the heads in `kept` of each layer: rows of q, k and v with their biases, and columns of o."""
    config = dict(checkpoint.config)
    size = head_dim(config)
    tensors = dict(checkpoint.tensors)
    for layer, groups in enumerate(kept):
        queries = _rows([head for _, heads in groups for head in heads], size)
        keys = _rows([group for group, _ in groups], size)
        for part, index in ((family.q, queries), (family.k, keys), (family.v, keys)):
            take_rows(tensors, family.in_layer(layer, part), index)
        take_columns(tensors, family.in_layer(layer, family.o), queries)
    config["num_key_value_heads"] = len(kept[0])
    config["num_attention_heads"] = sum(len(heads) for _, heads in kept[0])
    config["head_dim"] = size  # no longer hidden_size / num_attention_heads
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


def inputs_of(kept: Kept, size: int) -> torch.Tensor:
    """Return the indices of the inputs of o_proj that stay, int64 [heads · size]."""
    return _rows([head for _, heads in kept for head in heads], size)


def outputs_of(kept: Kept, size: int) -> torch.Tensor:
    """Return the indices of the outputs of k_proj and v_proj that stay, int64 [key/value heads · size]."""
    return _rows([group for group, _ in kept], size)


def without(groups: int, gone: Sequence[int]) -> list[float]:
    """Return a measure of the groups [groups] that removes those in `gone`: 0 for them, 1 for the others."""
    return [0.0 if group in gone else 1.0 for group in range(groups)]


def _rows(heads: Sequence[int], size: int) -> torch.Tensor:
    return (torch.tensor(heads)[:, None] * size + torch.arange(size)).flatten()


def _largest(values: Sequence[float], count: int) -> list[int]:
    """Return the indices of the `count` largest values, ascending; the first wins among equals."""
    return sorted(sorted(range(len(values)), key=lambda place: (-values[place], place))[:count])
