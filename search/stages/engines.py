"""The engines of one worker: the baseline's, kept open between trials, and one for each candidate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from evaluator.errors import EngineCrashed
from evaluator.process import EngineProcess
from search.say import Say
from search.setup.setting import Setting

T = TypeVar("T")


class Engines:
    """Starts engines as the setting wants them. Use it with `with`."""

    def __init__(self, setting: Setting) -> None:
        self._backend, self._settings = setting.machine.backend, setting.engine_settings
        self._base_path, self._logs = setting.model.path, setting.outputs / "logs"
        self._baseline: EngineProcess | None = None

    def baseline(self) -> EngineProcess:
        """Return the base model's engine; it is started when it is first wanted, and again after it died."""
        if self._baseline is None or not self._baseline.alive:
            self.close()
            self._baseline = self.start(self._base_path, "baseline")
        return self._baseline

    def start(self, path: Path, name: str, *, random_weights: bool = False) -> EngineProcess:
        """Start an engine on the checkpoint in `path`; its output goes to logs/engine-NAME.log.

        Args:
            path: The checkpoint's directory.
            name: The name of the log.
            random_weights: Whether config.json alone is read.

        Raises:
            EvaluationError: It can't be started.
        """
        settings = dataclasses.replace(self._settings, random_weights=random_weights)
        return EngineProcess(self._backend, path, settings, log=self._logs / f"engine-{name}.log")

    def close(self) -> None:
        """End the base model's engine."""
        if self._baseline is not None:
            self._baseline.close()
            self._baseline = None

    def __enter__(self) -> Engines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def once_more(work: Callable[[], T], say: Say) -> T:
    """Return what `work` returns; it is called again if an engine was killed by a signal in it.

    The kernel kills what takes most memory, whoever needs it. An engine that is killed twice is given up.

    Raises:
        EngineCrashed: The engine was killed a second time, or ended by itself.
    """
    try:
        return work()
    except EngineCrashed as error:
        if not error.killed:
            raise
        say("the engine was killed: once more")
        return work()
