"""The engines of one worker: the baseline's, kept open between trials, and one for each candidate."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from evaluator.process import EngineProcess
from search.setup.setting import Setting


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

    def start(self, path: Path, name: str) -> EngineProcess:
        """Start an engine on the checkpoint in `path`; its output goes to logs/engine-NAME.log."""
        return EngineProcess(self._backend, path, self._settings, log=self._logs / f"engine-{name}.log")

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
