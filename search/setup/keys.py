"""Names for what a study computes: the keys of caches, and the definition that a study keeps for life."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressors import build
from compressors.files import digest_of_json
from compressors.plan import CHOICES, CompressionPlan
from compressors.plan import VERSION as PLAN_VERSION
from compressors.statistics.second_moments import weighting
from evaluator import measurement
from search.setup.definition import of_file
from search.setup.setting import Setting


def circumstances(setting: Setting) -> dict[str, Any]:
    """Return what a measurement depends on apart from the model: the key of every cached number."""
    asked = {"tasks": {task.name: task.digest for task in setting.tasks}} if setting.tasks else {}
    return {
        **asked,
        "method": measurement.VERSION,
        "threads": setting.machine.threads,
        "text": setting.texts.digest,
        "workload": setting.workload.to_dict(),
        **({"prompts": digest_of_json(setting.prompts, 16)} if setting.prompts else {}),
        "speed": setting.file.evaluation.speed,
        "backend": setting.machine.backend,
        "compile": setting.file.evaluation.compile,
        "engine_version": setting.machine.engine_version,
        "device": setting.machine.device_name,
    }


def definition(setting: Setting) -> dict[str, Any]:
    """Return what must not change under a study's name; integer ranges may, categorical choices may not."""
    file, by_file = setting.file, of_file(setting.file)
    evaluation = json.loads(json.dumps(circumstances(setting)))
    del evaluation["engine_version"]  # a newer engine measures its own baseline
    fitted: dict[str, Any] = {}
    if _may_need_moments(setting):
        fitted = {"moments_windows": setting.texts.moments.count, **({"self": True} if file.text.writes_beside else {})}
    parts = {"perf": dict(setting.formula.perf)} if setting.tasks else {}
    return {
        **by_file,
        **fitted,
        "model": {**by_file["model"], "digest": setting.model.digest},
        "calibration": calibration_key(setting),
        "score": {**by_file["score"], **parts},
        "evaluation": evaluation,
    }


def _may_need_moments(setting: Setting) -> bool:
    """Whether any plan of the space rests on second moments."""
    for name in CHOICES:
        searched = getattr(setting.file.space, name)
        values = searched if isinstance(searched, list) else [getattr(searched, "high", searched)]
        identity = setting.model.identity
        if any(build.needs_moments(dataclasses.replace(identity, **{name: value})) for value in values):
            return True
    return False


def plan_digest(setting: Setting, plan: CompressionPlan) -> str:
    """Name the checkpoint that the plan makes of this base model and calibration text: 16 hexadecimal digits."""
    fitted = []
    if build.needs_moments(plan):
        fitted = [setting.texts.moments.digest, *weighting(setting.model.family), *build.versions(plan)]
    if plan.repair == "distill":
        fitted.append(setting.texts.distillation.digest)
    return plan.digest(" ".join([setting.model.digest, calibration_key(setting), *fitted]))


def measurement_key(setting: Setting, plan: CompressionPlan) -> str:
    """Name the plan's measurement under these circumstances: 24 hexadecimal digits."""
    return digest_of_json([plan_digest(setting, plan), circumstances(setting)], 24)


def baseline_path(setting: Setting) -> Path:
    """Return the file that keeps the base model's measurement under these circumstances."""
    name = f"{setting.model.digest[:12]}-{digest_of_json(circumstances(setting), 16)}"
    return setting.outputs / "baseline" / f"{name}.json"


def calibration_key(setting: Setting) -> str:
    """Name the activation statistics of this base model on this calibration text: 24 hexadecimal digits."""
    windows = [list(window) for window in setting.texts.calibration_windows]
    return digest_of_json([PLAN_VERSION, arithmetic(setting), setting.model.digest, windows], 24)


def moments_key(setting: Setting) -> str:
    """Name the second moments of this base model on this calibration text: 24 hexadecimal digits."""
    windows = setting.texts.moments.windows
    weighed = weighting(setting.model.family)
    parts = [PLAN_VERSION, "packed", arithmetic(setting), setting.model.digest, windows, *weighed]
    text = json.dumps(parts)  # without sorted keys: the order of the domains is part of the key
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def fitted_to(setting: Setting) -> str:
    """Name the text that second moments are collected on, without asking the base model for its part of it."""
    moments, text = setting.texts.moments, setting.file.text
    weights = list(text.calibration.items()) if isinstance(text.calibration, Mapping) else []
    given = [moments.given_digest, weights, moments.count, text.window, text.writes_beside]
    return digest_of_json([*given, *weighting(setting.model.family)], 16)


def arithmetic(setting: Setting) -> str:
    """Return the dtype in which statistics are collected."""
    return "float32" if setting.machine.device == "cpu" else setting.model.identity.precision


def description(setting: Setting, plan: CompressionPlan, target: str | None = None) -> dict[str, Any]:
    """Return what compression.json holds of a plan's checkpoint, but for its weights' digest."""
    return {
        "plan": plan.to_dict(),
        "plan_digest": plan_digest(setting, plan),
        "base": {"source": setting.file.source_shown, "digest": setting.model.digest},
        "for_transformers": target,
    }
