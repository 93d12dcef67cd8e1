"""Turn the residual stream into the basis of its principal components, before dimensions of it go."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from compressors.choices import Value
from compressors.methods import rotation
from compressors.plan import CompressionPlan
from compressors.steps import Build

VERSIONS: Mapping[tuple[str, Value], str] = {("rotation", "pca"): f"rotation {rotation.VERSION}"}


def applies(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Say whether the plan cuts hidden_size in another basis than the model's own."""
    return plan.rotation == "pca" and plan.hidden_size != base.hidden_size


def shapes(made: Build) -> Build:
    """Store the lm_head apart, as a turned model has it; the basis is the model's own."""
    return dataclasses.replace(made, checkpoint=rotation.turn(made.checkpoint, made.family, None, made.device))


def run(made: Build) -> Build:
    """Turn the model, and what is known of its activations and second moments."""
    if made.activations is None or made.moments is None:
        return shapes(made)
    base, family = made.checkpoint, made.family
    turned = rotation.principal(base, family, made.moments.windows(), made.moments.path, made.device, made.say)
    return dataclasses.replace(
        made,
        checkpoint=rotation.turn(base, family, turned, made.device),
        activations=dataclasses.replace(made.activations, norm_mean_square=turned.mean_square),
        moments=dataclasses.replace(made.moments, change=rotation.of_inputs(base, family, turned.basis)),
        basis=turned.basis,
    )
