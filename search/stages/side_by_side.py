"""Engines with random weights, side by side beside the base model's, each started by a thread of its own.

On a GPU they can start while other work goes on: a start takes a processor for ten to thirty seconds, and the GPU for
moments.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from compressors import build
from compressors.errors import CompressionError
from compressors.files import write_json
from compressors.plan import CompressionPlan, short
from evaluator import backends
from evaluator.closing import Closing
from evaluator.errors import EvaluationError
from evaluator.process import EngineProcess
from search.processes import abandoned, mark
from search.say import Say
from search.setup.setting import Setting
from search.stages.engines import HOST_BYTES, Engines, engine_bytes, room_on_gpu, room_on_host

TOGETHER = 15  # engines, at most
SHARE_MEANWHILE = 0.6  # of the room on the GPU that engines may take which start while other work goes on there
PLACE = "probes-"  # + the process's mark: the directory of the models that are started
_count = itertools.count()


def fitting(setting: Setting, plans: Sequence[CompressionPlan], *, share: float = 1.0) -> int:
    """Return how many of the plans, the first ones, can run side by side beside the base model's engine.

    The free memory decides: the GPU's, or the machine's, where engines that wait for their turn take no processor. It
    is one where that is not known.

    Args:
        setting: What the study shares.
        plans: The plans, in order.
        share: The share of the room that they may take.
    """
    on_gpu = setting.machine.device == "cuda"
    room = share * (room_on_gpu() if on_gpu else room_on_host(setting.machine.device))
    beside, count, taken = engine_bytes(setting) if on_gpu else HOST_BYTES, 0, 0.0
    for plan in plans[:TOGETHER]:
        taken += setting.model.checkpoint.size_bytes * setting.size_ratio(plan) + beside
        if taken > room:
            break
        count += 1
    return count if on_gpu else max(count, min(1, len(plans)))


class SideBySide(Closing):
    """The engines of some plans. They are starting when this is made. Use it with `with`, or close it.

    Args:
        setting: What the study shares.
        engines: The worker's engines.
        plans: The plans; an engine that needs no weights gets a config.json alone.
    """

    def __init__(self, setting: Setting, engines: Engines, plans: Sequence[CompressionPlan]) -> None:
        self.plans = tuple(plans)
        self._setting, self._engines = setting, engines
        self._root = _place(setting) / str(next(_count))
        self._running: list[EngineProcess | None] = [None] * len(plans)
        self._refusals: dict[int, str] = {}
        self._closed, self._lock = False, threading.Lock()
        self._threads = [threading.Thread(target=self._start, args=(at,), daemon=True) for at in range(len(plans))]
        for thread in self._threads:
            thread.start()

    def ready(self, say: Say) -> list[EngineProcess | None]:
        """Wait until all are started; one that can't be started is None, and the reason is told."""
        for thread in self._threads:
            thread.join()
        for at, reason in sorted(self._refusals.items()):
            say(f"speed table: {short(self.plans[at])} is left out: {reason}")
        return list(self._running)

    def close(self) -> None:
        """End the engines; one that is still starting ends as soon as it is ready, or with this process."""
        with self._lock:
            self._closed = True
            running, self._running = self._running, [None] * len(self.plans)
        for engine in running:
            if engine is not None:
                engine.close()
        shutil.rmtree(self._root, ignore_errors=True)
        with contextlib.suppress(OSError):  # others are in it
            self._root.parent.rmdir()

    def _start(self, at: int) -> None:
        path, setting = self._root / str(at), self._setting
        try:
            _write(setting, self.plans[at], path)
            engine = self._engines.start(path, f"probe-{at}", random_weights=_config_alone(setting))
        except (CompressionError, EvaluationError, OSError) as error:
            self._refusals[at] = str(error)
            return
        with self._lock:
            if not self._closed:
                self._running[at] = engine
                return
        engine.close()


class Ahead(Closing):
    """Starts the first of some plans' engines in the background, once the base model's is there. Use it with `with`.

    On a CPU it starts the base model's alone. What can't be started then is tried again when it is wanted.
    """

    def __init__(self, setting: Setting, engines: Engines, plans: Sequence[CompressionPlan]) -> None:
        self._setting, self._engines, self._plans = setting, engines, plans
        self._group: SideBySide | None = None
        self._closed, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._start, daemon=True)
        self._thread.start()

    def take(self) -> SideBySide | None:
        """Return the engines that were started, which are the caller's now; None where there are none."""
        self._thread.join()
        with self._lock:
            group, self._group = self._group, None
        return group

    def close(self) -> None:
        """End the engines that nobody took."""
        with self._lock:
            self._closed = True
            group, self._group = self._group, None
        if group is not None:
            group.close()

    def _start(self) -> None:
        with contextlib.suppress(EvaluationError):
            self._engines.baseline()
            if self._setting.machine.device != "cuda":
                return
            count = fitting(self._setting, self._plans, share=SHARE_MEANWHILE)
            with self._lock:
                if count and not self._closed:
                    self._group = SideBySide(self._setting, self._engines, self._plans[:count])


def _place(setting: Setting) -> Path:
    """Return this process's directory for models; those of processes that were killed are removed."""
    tables = setting.outputs / "forecast"
    for left_over in tables.glob(f"{PLACE}*"):
        if abandoned(left_over, left_over.name.removeprefix(PLACE)):
            shutil.rmtree(left_over, ignore_errors=True)
    return tables / f"{PLACE}{mark()}"


def _config_alone(setting: Setting) -> bool:
    return backends.module_of(setting.machine.backend).FACTS.random_weights


def _write(setting: Setting, plan: CompressionPlan, path: Path) -> None:
    """Write what the engine needs: config.json, or a whole checkpoint with arbitrary values."""
    made = build.shapes(plan, setting.model.checkpoint, setting.model.family)
    if _config_alone(setting):
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "config.json", made.config)
    else:
        made.write(path)
