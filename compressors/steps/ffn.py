"""Narrow the feed-forward networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from compressors.choices import Value
from compressors.methods import ffn, importance
from compressors.plan import CompressionPlan
from compressors.steps import Build, repaired_by_ridge

VERSIONS: Mapping[tuple[str, Value], str] = {}


def applies(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Say whether the plan removes FFN channels."""
    return plan.intermediate_size != base.intermediate_size


def shapes(made: Build) -> Build:
    """Keep the first channels."""
    ffn.require(made.plan.intermediate_size, made.own.intermediate_size)
    return _cut(made, [torch.arange(made.plan.intermediate_size)] * len(made.layers))


def run(made: Build) -> Build:
    """Keep the channels that the plan's measure of importance chooses, and repair what reads them by ridge."""
    ffn.require(made.plan.intermediate_size, made.own.intermediate_size)
    kept = importance.choose_channels(
        made.checkpoint,
        made.family,
        made.plan.intermediate_size,
        made.plan.importance,
        activations=made.activations,
        moments=made.moments,
        device=made.device,
    )
    return repaired_by_ridge(_cut(made, kept), made.checkpoint, [made.family.down])


def _cut(made: Build, kept: Sequence[torch.Tensor]) -> Build:
    family = made.family
    return made.with_kept(
        ffn.cut(made.checkpoint, family, kept),
        inputs={family.down: kept},
        outputs={family.gate: kept, family.up: kept},
    )
