"""Identifies the process that runs a trial, finds out whether it is alive, and handles requests to stop."""

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
    """Return what identifies this process, so that its death can be seen at once on the same machine."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """Return the start time of a process, which tells it from another with a recycled pid; None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:  # no /proc (macOS): the pid alone has to suffice
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def alive(worker: dict[str, Any]) -> bool:
    """Return whether the process that `identify_worker` described is alive; one on another machine counts as alive."""
    return bool(worker["host"] != socket.gethostname() or _started(worker["pid"]) == worker["started"])


def process_alive(pid: int) -> bool:
    """Return whether a process with this pid exists on this machine."""
    return _started(pid) is not None


class Stop:
    """Stop is a context manager in which SIGINT and SIGTERM raise KeyboardInterrupt and are remembered.

    Some libraries swallow the exception while they are imported; `check` then raises it again. Inside `held` a first
    signal is only remembered: Optuna, interrupted between taking a trial and running it, would leave it RUNNING. A
    second signal always raises.

    Attributes:
        asked: Whether a signal has arrived.
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
        self._raise_interrupt(error)

    def _raise_interrupt(self, error: BaseException | None) -> None:
        """Raise KeyboardInterrupt in place of the storage error that an interrupted commit has turned it into."""
        if self.asked and isinstance(error, StorageInternalError):
            raise KeyboardInterrupt from error

    def _on_signal(self, number: int, frame: object) -> None:
        again, self.asked = self.asked, True
        if again or not self._held:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delay a signal that arrives in the block until `check` or `released`."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Raise on signals again, within `held`; a delayed signal raises at once."""
        before, self._held = self._held, False
        try:
            self.check()
            yield
        except StorageInternalError as error:
            self._raise_interrupt(error)
            raise
        finally:
            self._held = before

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has arrived."""
        if self.asked:
            raise KeyboardInterrupt
