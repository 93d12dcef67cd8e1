"""Statistics of the base model on the calibration text: collected once, kept under outputs/calibration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from compressors import build, cached
from compressors.plan import CompressionPlan
from compressors.statistics import activations, second_moments
from search.say import Say, silent
from search.setup import keys
from search.setup.machine import require_disk
from search.setup.setting import Setting


def calibration_path(setting: Setting) -> Path:
    """Return the file that keeps the activation statistics."""
    return setting.outputs / "calibration" / f"{keys.calibration_key(setting)}.safetensors"


def calibrate(setting: Setting, say: Say = silent) -> activations.Calibration:
    """Return the base model's activation statistics."""
    base = setting.model.checkpoint

    def collect(path: Path) -> None:
        say("calibrating")
        activations.calibrate(
            base,
            setting.texts.calibration_windows,
            setting.machine.device,
            progress=lambda done, total: say(f"calibrating, window {done} of {total}"),
        ).save(path)

    return cached.kept(
        calibration_path(setting),
        lambda path: activations.Calibration.load(path, base),
        collect,
        lambda: say("waiting for another process that calibrates"),
    )


def moments_for(setting: Setting, plan: CompressionPlan, say: Say = silent) -> second_moments.Moments | None:
    """Return the second moments that this plan asks for; None when it asks for none."""
    if not build.needs_moments(plan):
        return None
    windows = setting.texts.moments.windows
    path = setting.outputs / "calibration" / f"moments-{keys.moments_key(setting)}"
    base = setting.model.checkpoint
    if not path.is_dir():
        needed = second_moments.file_bytes(base, len(windows))
        require_disk(needed, path.parent, "second moments")
    moments = second_moments.collect(
        base,
        windows,
        path,
        setting.machine.device,
        progress=lambda done, total: say(f"second moments, layer {done} of {total}"),
        weights=setting.texts.moments.shares,
    )
    return dataclasses.replace(moments, more=lambda: setting.texts.distillation.windows)
