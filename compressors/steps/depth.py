"""Drop layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from compressors.choices import Value
from compressors.methods import depth, layers_by_kl
from compressors.plan import CompressionPlan
from compressors.steps import Build

VERSIONS: Mapping[tuple[str, Value], str] = {}
MEASURED = (*depth.BY_KL, "importance")  # rules that need text


def applies(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Say whether the plan drops layers."""
    return plan.num_hidden_layers != base.num_hidden_layers


def shapes(made: Build) -> Build:
    """Drop as many layers as the plan does: the last ones, where it takes text to know which."""
    rule = "top" if made.plan.drop_from in MEASURED else made.plan.drop_from
    return _cut(made, depth.choose(made.own.num_hidden_layers, made.plan.num_hidden_layers, rule, None))


def run(made: Build) -> Build:
    """Drop the layers that the plan's rule chooses."""
    plan, count = made.plan, made.own.num_hidden_layers
    if plan.drop_from in depth.BY_KL and made.moments is not None:
        order = layers_by_kl.order(
            made.base,
            made.family,
            made.moments.windows(),
            count - plan.num_hidden_layers,
            made.moments.path,
            made.device,
            look_ahead=plan.drop_from == "kl-look-ahead",
            say=made.say,
        )
        return _cut(made, depth.choose(count, plan.num_hidden_layers, plan.drop_from, None, order))
    if plan.drop_from == "importance" and made.activations is not None:
        return _cut(made, depth.choose(count, plan.num_hidden_layers, plan.drop_from, made.activations))
    return shapes(made)


def _cut(made: Build, layers: Sequence[int]) -> Build:
    return dataclasses.replace(
        made,
        checkpoint=depth.cut(made.checkpoint, made.family, layers),
        layers=tuple(layers),
        activations=None if made.activations is None else made.activations.of_layers(made.family, layers),
        moments=None if made.moments is None else made.moments.of_layers(layers),
    )
