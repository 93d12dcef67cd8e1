"""Narrow the residual stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from compressors.choices import Value
from compressors.methods import hidden
from compressors.plan import CompressionPlan
from compressors.steps import Build, repaired_by_ridge

VERSIONS: Mapping[tuple[str, Value], str] = {}


def applies(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Say whether the plan removes dimensions of the residual stream."""
    return plan.hidden_size != base.hidden_size


def shapes(made: Build) -> Build:
    """Keep the first dimensions, and leave the norms' gains uncorrected."""
    return _cut(made, hidden.choose(made.own.hidden_size, made.plan.hidden_size, None), None)


def run(made: Build) -> Build:
    """Keep the most active dimensions, in a turned model the first; repair what reads them by ridge."""
    if made.activations is None:
        return shapes(made)
    family, activity = made.family, made.activations
    squares = [activity.norm_mean_square[name] for name in family.residual_norms(len(made.layers))]
    by = None if made.basis is not None else activity
    cut = _cut(made, hidden.choose(made.own.hidden_size, made.plan.hidden_size, by), squares)
    readers = [family.q, family.k, family.v, family.gate, family.up]
    return repaired_by_ridge(cut, made.checkpoint, readers)


def _cut(made: Build, kept: torch.Tensor, squares: list[torch.Tensor] | None) -> Build:
    family, of_layers = made.family, [kept] * len(made.layers)
    cut = made.with_kept(
        hidden.cut(made.checkpoint, family, kept, squares), inputs={family.q: of_layers, family.gate: of_layers}
    )
    return dataclasses.replace(cut, dimensions=kept)
