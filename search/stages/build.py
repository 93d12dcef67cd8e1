"""A plan's checkpoint: in memory for scoring, or on disk for an engine."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from compressors import build, cached
from compressors.choices import SCHEMES
from compressors.device import release
from compressors.errors import MachineError
from compressors.files import write_json
from compressors.methods.quantizers import Rounded
from compressors.model.checkpoint import Checkpoint
from compressors.plan import DESCRIPTION, CompressionPlan
from search.processes import abandoned, mark
from search.say import Say
from search.setup import collect, keys
from search.setup.machine import free_memory, require_disk
from search.setup.setting import Setting
from search.stages import intact

BUILDING = ".building-"  # + the worker's mark: where a checkpoint is until it is whole
STRENGTH = 0.1  # of a quick ridge: choosing one for each projection takes longer than all the rest
TOKENS = 24_576  # of a quick stream: four windows of 1,024 for each of six domains
SHARE_OF_FREE = 8  # of the free memory, at most one part in so many holds rounded weights
_rounded: dict[str, dict[str, Rounded]] = {}  # weights that the last screen rounded, by the plan's digest


def checkpoint_of(
    setting: Setting, plan: CompressionPlan, say: Say, *, simulate: bool = False, quick: bool = False
) -> Checkpoint:
    """Return the plan's checkpoint; its weights are made when they are used.

    Args:
        setting: What the study shares.
        plan: The plan, in its canonical form.
        say: Told what takes long.
        simulate: Make a quantized plan a model of plain tensors that computes the same.
        quick: Have `repair: ridge` take one strength for all projections, and `repair: stream` few tokens.

    Raises:
        InfeasiblePlan: The plan can't be built.
        CheckpointError: Statistics can't be collected or read.
    """
    moments = collect.moments_for(setting, plan, say)
    rounded = None if quick else _rounded_of(setting, plan, fresh=simulate)
    if moments is not None and quick:
        moments = dataclasses.replace(moments, strength=STRENGTH, tokens=TOKENS)
    return build.apply(
        plan,
        setting.model.checkpoint,
        setting.model.family,
        collect.calibrate(setting, say) if build.needs_activations(plan, setting.model.identity) else None,
        moments=moments,
        simulate=simulate,
        rounded=rounded,
        device=setting.machine.device,
        say=say,
    )


def _rounded_of(setting: Setting, plan: CompressionPlan, *, fresh: bool) -> dict[str, Rounded] | None:
    """Return what keeps the plan's rounded weights from its screen to its build; None where they take no time.

    Only the last plan's are kept, as many bytes as it has parameters, where that is a small part of what is free.

    Args:
        setting: What the study shares.
        plan: The plan.
        fresh: Whether they are about to be made.
    """
    digest = keys.plan_digest(setting, plan)
    if not fresh:
        return _rounded.pop(digest, None)
    _rounded.clear()
    if plan.quantizer == "nearest" or plan.precision not in SCHEMES:
        return None
    free = free_memory(setting.machine.device)
    if free is None or setting.model.checkpoint.total_parameters > free / SHARE_OF_FREE:
        return None
    return _rounded.setdefault(digest, {})


def write(setting: Setting, plan: CompressionPlan, say: Say, *, limited: bool = True) -> tuple[Path, str]:
    """Write the plan's checkpoint under outputs/checkpoints, unless it is there; return it and its weights' sha256.

    One that is there is compared with its digests; a damaged one is deleted and built again.

    Args:
        setting: What the study shares.
        plan: The plan, in its canonical form.
        say: Told what takes long.
        limited: Refuse a checkpoint that is larger than the study's limit.

    Raises:
        InfeasiblePlan: The plan can't be built, or is too large.
        MachineError: It can't be written; nothing is left there.
    """
    path = setting.outputs / "checkpoints" / keys.plan_digest(setting, plan)
    shapes = build.shapes(plan, setting.model.checkpoint, setting.model.family)
    known = cached.known(path, lambda path: intact.read(path, shapes), tree=True)
    if known is not None:
        return path, str(known["weights_sha256"])
    needed = build.predicted_bytes(plan, setting.model.checkpoint, setting.model.family)
    require_disk(needed, path.parent, "this plan's checkpoint")
    checkpoint = checkpoint_of(setting, plan, say)
    build.require_size(checkpoint, setting.max_bytes if limited else None)
    building = path.with_name(f"{BUILDING}{mark()}")
    scratch = building / path.name
    try:
        weights_sha256 = checkpoint.write(scratch)
        described = {**keys.description(setting, plan), "weights_sha256": weights_sha256}
        write_json(scratch / DESCRIPTION, described)
        if not path.exists():  # else another worker has built the same meanwhile
            scratch.replace(path)
    except OSError as error:
        raise MachineError(f"build: {path}: {error.strerror or error}; nothing was left there") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
        release(setting.machine.device)
    return path, weights_sha256


def remove_unfinished(directory: Path) -> None:
    """Remove what builds that were killed left half-written, or half-deleted, in a directory of checkpoints."""
    for damaged in directory.glob(".*.damaged-*"):
        shutil.rmtree(damaged, ignore_errors=True)
    for scratch in directory.glob(f"{BUILDING}*"):
        if abandoned(scratch, scratch.name.removeprefix(BUILDING)):
            shutil.rmtree(scratch, ignore_errors=True)
