"""Attention heads: fewer key/value groups, and fewer query heads in each.

Query head h reads key/value head h // (H / G), for H query and G key/value heads, so that every group keeps the same
number of query heads, in their order. Which ones stay may differ by layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from compressors.errors import InfeasiblePlan
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family, head_dim, take_columns, take_rows

Kept = tuple[tuple[int, tuple[int, ...]], ...]  # of a layer: (key/value head, its query heads), ascending


def choose(
    heads: int,
    groups: int,
    keep_heads: int,
    keep_groups: int,
    activity: Sequence[float],
    of_groups: Sequence[float] | None = None,
) -> Kept:
    """What stays in a layer with this activity of its query heads [heads].

    The groups with the largest energy (sum of squared activity) stay, and in each its most active query heads:
    Minitron's head importance, https://arxiv.org/abs/2407.14679. of_groups: another measure of the groups [groups].
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
    """Why `keep_heads` query and `keep_groups` key/value heads can't be kept of these, or None."""
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
    """Keep these heads of each layer: rows of q, k and v with their biases, columns of o."""
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
    """The inputs of o_proj that stay, int64 [heads · size]."""
    return _rows([head for _, heads in kept for head in heads], size)


def outputs_of(kept: Kept, size: int) -> torch.Tensor:
    """The outputs of k_proj and v_proj that stay, int64 [key/value heads · size]."""
    return _rows([group for group, _ in kept], size)


def without(groups: int, gone: Sequence[int]) -> list[float]:
    """Return a measure of `groups` groups by which those that are `gone` go: 0 for them, 1 for the others."""
    return [0.0 if group in gone else 1.0 for group in range(groups)]


def _rows(heads: Sequence[int], size: int) -> torch.Tensor:
    return (torch.tensor(heads)[:, None] * size + torch.arange(size)).flatten()


def _largest(values: Sequence[float], count: int) -> list[int]:
    """The places of the `count` largest, ascending; of equals the first."""
    return sorted(sorted(range(len(values)), key=lambda place: (-values[place], place))[:count])
