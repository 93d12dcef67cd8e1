"""Let the cut model learn from the base model for a short time, before it is quantized."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

import torch

from compressors.choices import Value
from compressors.device import release
from compressors.distillation import repair as distillation
from compressors.methods import repair, rotation, stream
from compressors.methods.kept_fits import fitted
from compressors.plan import CompressionPlan, is_cut
from compressors.steps import Build

VERSIONS: Mapping[tuple[str, Value], str] = {
    ("repair", "distill"): f"distill {distillation.VERSION} after ridge {repair.VERSION} and stream {stream.VERSION}"
}


def applies(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Say whether the plan repairs a cut by a distillation."""
    return plan.repair == "distill" and is_cut(plan, base)


def shapes(made: Build) -> Build:
    """Change nothing: a repair keeps every shape."""
    return made


def run(made: Build) -> Build:
    """Distill the model; that is done when a weight is first read."""
    if made.moments is None:
        return made
    moments, cut, device = made.moments, made.checkpoint, made.device

    def fit() -> dict[str, torch.Tensor]:
        work = moments.path / f"distilling-{key(made)}"
        weights = distillation.repaired(cut, made.base, moments.lessons(), device, work, made.say)
        release(device)
        return weights

    kept = fitted(cut, distillation.names(cut), moments.path, "distill", lambda: key(made), fit, made.say)
    return dataclasses.replace(made, checkpoint=kept)


def key(made: Build) -> str:
    """Return a digest of what is cut, how it is repaired, and the text that it learns from."""
    chosen = {part: [index.tolist() for index in of_layer] for part, of_layer in sorted(made.inputs.items())}
    dimensions = None if made.dimensions is None else made.dimensions.tolist()
    turned = [made.plan.rotation, rotation.VERSION] if made.basis is not None else None
    assert made.moments is not None
    fitted_to = [made.moments.weights, made.moments.strength, made.moments.lessons()]
    settings = [distillation.tokens_on(made.device), distillation.BATCH_TOKENS, distillation.RATES]
    how = [
        VERSIONS["repair", "distill"],
        settings,
        made.device,
        list(made.layers),
        chosen,
        dimensions,
        turned,
        fitted_to,
    ]
    return hashlib.sha256(json.dumps(how).encode()).hexdigest()[:24]
