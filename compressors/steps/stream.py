"""Refit what writes to the residual stream, so that the stream becomes the base model's again.

Where layers were dropped a distillation begins from that too: ridge changes nothing there, and what a closed form gives
in seconds would take many updates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from compressors.choices import Value
from compressors.methods import repair, stream
from compressors.plan import CompressionPlan, leaves_gap
from compressors.statistics.residual_streams import Stays
from compressors.steps import BEGIN_WITH_RIDGE, Build

VERSIONS: Mapping[tuple[str, Value], str] = {
    ("repair", "stream"): f"stream {stream.VERSION}",
    ("repair", "ridge"): f"ridge {repair.VERSION}",  # of each step that cuts
}


def applies(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Say whether the plan repairs through the whole model."""
    return plan.repair == "stream" or (plan.repair == "distill" and leaves_gap(plan, base))


def shapes(made: Build) -> Build:
    """Change nothing: a repair keeps every shape."""
    return made


def run(made: Build) -> Build:
    """Refit the weights; they are computed when one of them is first read."""
    if made.moments is None:
        return made
    kept = made.dimensions
    if made.basis is not None and kept is not None:
        kept = made.basis[:, kept]
    stays = Stays(made.layers, kept, made.inputs, made.outputs)
    before = f"ridge {repair.VERSION}" if made.plan.repair in BEGIN_WITH_RIDGE else None
    refit = stream.take_over(
        made.checkpoint, made.base, made.family, stays, made.moments, made.device, made.say, before=before
    )
    return dataclasses.replace(made, checkpoint=refit)
