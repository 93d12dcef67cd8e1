"""The GPU's side of a decode step of the base model: how long it is busy, and how fast it reads memory.

It is measured once, in an engine of its own that is closed afterwards: a profiler can slow down the engine that it has
seen, and the baseline's engine is timed again with every trial. It is kept in outputs/forecast, beside the speed table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressors import cached
from evaluator import backends
from evaluator.errors import EvaluationError
from search.say import Say
from search.setup.setting import Setting
from search.stages import speed_table
from search.stages.engines import Engines

VERSION = 1


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """What the GPU does for a decode step of the base model.

    Attributes:
        busy_ms: The milliseconds in which it is busy, by batch size; those that could be profiled.
        bytes_per_s: The bytes a second that its memory moves; None where that could not be measured.
    """

    busy_ms: Mapping[int, float] = dataclasses.field(default_factory=dict)
    bytes_per_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the times as JSON values."""
        busy = {str(size): ms for size, ms in self.busy_ms.items()}
        return {"version": VERSION, "busy_ms": busy, "bytes_per_s": self.bytes_per_s}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepTimes:
        """Return the times that `to_dict` wrote.

        Raises:
            ValueError: They are of another version, or can't be true.
        """
        if values["version"] != VERSION:
            raise ValueError(f"step times: version {values['version']} is not {VERSION}")
        busy = {int(size): float(ms) for size, ms in values["busy_ms"].items()}
        rate = values["bytes_per_s"]
        times = cls(busy, None if rate is None else float(rate))
        if not all(math.isfinite(each) and each > 0 for each in (*busy.values(), times.bytes_per_s or 1.0)):
            raise ValueError("step times: not positive")
        return times


def path_of(setting: Setting) -> Path:
    """Return the file that keeps the times."""
    table = speed_table.path_of(setting)
    return table.with_name(table.name.replace("speed-", "step-"))


def step_times(setting: Setting, engines: Engines, say: Say) -> StepTimes:
    """Return the times; measure them if they are not known.

    On a CPU, for a workload of whole requests, or where measuring fails, they are empty.

    Args:
        setting: What the study shares.
        engines: The worker's engines.
        say: Told what is done, and why something stays unknown.
    """
    path = path_of(setting)
    known = cached.known(path, lambda path: StepTimes.from_dict(cached.read_json(path)))
    if known is not None:
        return known
    backend = backends.module_of(setting.machine.backend)
    if setting.machine.device != "cuda" or not hasattr(backend.Engine, "busy_ms") or setting.workload.kind != "decode":
        return StepTimes()
    say("forecast: profiling decode steps of the base model")
    busy: dict[int, float] = {}
    rate = None
    try:
        alone = backend.FACTS.random_weights
        with engines.start(setting.model.path, "profiled", random_weights=alone) as engine:
            rate = engine.bytes_per_s()  # first: it can't harm the engine
            workload = setting.workload
            for size in workload.batch_sizes:
                ms = engine.busy_ms(size, workload.prompt_tokens, workload.decode_steps, workload.seed)
                if ms is not None:
                    busy[size] = ms
    except EvaluationError as error:
        say(f"forecast: the GPU's busy time is not known: {error}")
    times = StepTimes(busy, rate)
    if busy and rate is not None:  # else it is tried again
        cached.keep_json(path, times.to_dict())
    return times
