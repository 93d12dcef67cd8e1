"""Processes: who runs a trial, whether it is alive, and how it is asked to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError


def identify_worker() -> dict[str, Any]:
    """Says which process runs a trial, so that its death can be seen at once on the same machine."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """The process's start time, so that a recycled pid is not taken for the dead worker; None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:  # no /proc (macOS): the pid alone must do
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def alive(worker: dict[str, Any]) -> bool:
    """Whether the process that `identify_worker` named runs; one of another machine is taken to."""
    return bool(worker["host"] != socket.gethostname() or _started(worker["pid"]) == worker["started"])


def process_alive(pid: int) -> bool:
    return _started(pid) is not None


class Stop:
    """Within it, SIGINT and SIGTERM raise KeyboardInterrupt and are remembered: a library that swallows the exception,
    as some do while they are being imported, does not swallow the wish. Asked for a second time, it is only raised.

    In `held` it is remembered alone: Optuna, interrupted between taking a trial and running it, would leave it RUNNING.
    """

    def __init__(self) -> None:
        self.asked = self._held = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._raise_what_was_meant(error)

    def _raise_what_was_meant(self, error: BaseException | None) -> None:
        """A storage that was interrupted in a commit calls it an error of its own."""
        if self.asked and isinstance(error, StorageInternalError):
            raise KeyboardInterrupt from error

    def _on_signal(self, number: int, frame: object) -> None:
        again, self.asked = self.asked, True
        if again or not self._held:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within it a signal waits for `check`, or for `released`."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """A part of `held` in which a signal raises, also one that came before."""
        before, self._held = self._held, False
        try:
            self.check()
            yield
        except StorageInternalError as error:
            self._raise_what_was_meant(error)
            raise
        finally:
            self._held = before

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt
