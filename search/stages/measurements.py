"""Reads and keeps the numbers of a study in files, which are checked when they are read."""

from __future__ import annotations

import math
from pathlib import Path

from compressors import cached
from compressors.plan import CompressionPlan
from evaluator.measurement import Measurement
from search.json_values import measurement_from
from search.setup import keys
from search.setup.setting import Setting


def path_of(setting: Setting, plan: CompressionPlan) -> Path:
    """Return the file that keeps the plan's measurement.

    Where times decide nothing, a plan is timed by few turns: a study in which they do must not take such a measurement
    for its own. A measurement with all turns serves both.
    """
    path = measured_as(setting, keys.measurement_key(setting, plan))
    if setting.wants_time or not setting.file.evaluation.is_timed or known(path, setting) is not None:
        return path
    return path.with_stem(f"{path.stem}-brief")


def measured_as(setting: Setting, name: str) -> Path:
    """Return the file of the measurement with this name, as a trial has it."""
    return setting.outputs / "measurements" / f"{name}.json"


def read(path: Path, setting: Setting) -> Measurement:
    """Return the measurement in a file; what it raises is what is wrong with it."""
    measured = measurement_from(cached.read_json(path))
    shards, tasks = len(setting.texts.shards), {task.name for task in setting.tasks}
    if len(measured.shard_nll) != shards:
        raise ValueError(f"it has {len(measured.shard_nll)} shards of {shards}")
    if not math.isclose(measured.perplexity, math.exp(measured.nll_nats_per_token), rel_tol=1e-6):
        raise ValueError("its perplexity is not that of its loss")
    if not math.isclose(measured.tokens_per_sec * measured.time_per_token_ms, 1e3, rel_tol=1e-6):
        raise ValueError("its times contradict each other")
    if measured.tasks.keys() != tasks:
        raise ValueError(f"it has the tasks {', '.join(sorted(measured.tasks)) or 'none'}")
    return measured


def known(path: Path, setting: Setting) -> Measurement | None:
    """Return the measurement in a file; None where there is none, or a damaged one, which is removed."""
    return cached.known(path, lambda path: read(path, setting))


def keep(path: Path, measured: Measurement) -> None:
    """Keep a measurement in a file.

    Raises:
        MachineError: The file can't be written.
    """
    cached.keep_json(path, measured.to_dict(), digest=False)
