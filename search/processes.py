"""Identifies the process that runs a trial, finds out whether it is alive, and handles requests to stop."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

FOREIGN_DAYS = 1.0  # after which what another machine or container left half-written is taken for abandoned
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
IMPATIENT_S = 0.5  # a second SIGINT within this time is taken for the same one: `timeout` sends it twice
Result = TypeVar("Result")


def identify_worker() -> dict[str, Any]:
    """Return what identifies this process, so that its death can be seen at once where its pid means the same."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), **_pid_space()}


@functools.cache
def _pid_space() -> dict[str, str | None]:
    """Return what tells containers apart: the boot of the machine, and the namespace of process ids within it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "namespace": Path("/proc/self/ns/pid").readlink().name}
    except OSError:  # no /proc
        return {"boot": None, "namespace": None}


def _started(pid: int) -> str | None:
    """Return the start time of a process, which tells it from another with a recycled pid; None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if stat[0] in ("Z", "X") else stat[19]  # a zombie is dead, and waits for its parent
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


def visible(worker: dict[str, Any]) -> bool:
    """Return whether the process that `identify_worker` described has its pid in this process's pid namespace."""
    space = _pid_space()
    if worker.get("namespace") is None or space["namespace"] is None:  # also of a study begun by an older version
        return bool(worker["host"] == socket.gethostname())
    return all(worker.get(name) == value for name, value in space.items())


def alive(worker: dict[str, Any]) -> bool | None:
    """Return whether the process that `identify_worker` described is alive.

    None: that can't be seen from here, since it is on another machine or in another container.
    """
    return _started(worker["pid"]) == worker["started"] if visible(worker) else None


def mark() -> str:
    """Return this process's mark in the names of files and directories that it has not finished."""
    return f"{os.getpid()}@{_place()}"


def _place() -> str:
    return hashlib.sha256(json.dumps([socket.gethostname(), *_pid_space().values()]).encode()).hexdigest()[:8]


def abandoned(path: Path, its_mark: str) -> bool:
    """Return whether the process that gave `path` a name with this mark has died and left it.

    That of another machine or container can't be seen from here: its files are abandoned when they are a day old.
    """
    known = re.match(r"(\d+)(?:@([0-9a-f]{8}))?", its_mark)
    if known is None:
        return True
    if known[2] not in (None, _place()):
        try:
            return time.time() - path.stat().st_mtime > FOREIGN_DAYS * 86400
        except OSError:
            return False  # finished or removed meanwhile
    return _started(int(known[1])) is None


class Stop:
    """Stop is a context manager in which SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt once and are remembered.

    Some libraries swallow the exception while they are imported; `check` then raises it again. Inside `held` a signal
    is only remembered, so that a trial is recorded whole; inside `uninterrupted`, until the block ends. After the first
    signal a second SIGINT ends the process at once, and other signals are ignored: a closed terminal sends several.

    Attributes:
        asked: Whether a signal has arrived.
        number: The number of the first signal, or 0.
    """

    def __init__(self) -> None:
        self.asked, self.number = False, 0
        self._active = self._held = False
        self._since = 0.0
        self._old: dict[int, Any] = {}
        self._terminals: tuple[int, ...] = ()

    def __enter__(self) -> Stop:
        global _current  # signal handlers belong to the process, and so does their state
        _current = self
        self._active = True
        self._terminals = tuple(number for number in (1, 2) if os.isatty(number))
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._active = False
        for number, handler in self._old.items():
            # what is left to do after a signal takes moments; another signal must not end it in a traceback
            signal.signal(number, self._on_signal if self.asked else handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.asked:
            if number == signal.SIGINT and time.monotonic() - self._since > IMPATIENT_S:
                self._end_at_once()
            return
        self.asked, self.number, self._since = True, number, time.monotonic()
        if number == signal.SIGHUP:
            self._leave_terminals()
        if not self._held:
            raise KeyboardInterrupt

    def _end_at_once(self) -> None:
        show_cursor = b"\x1b[?25h" if 2 in self._terminals else b""
        with contextlib.suppress(OSError):
            os.write(2, show_cursor + b"stopped at once; run the same command again to resume\n")
        os._exit(128 + self.number)

    def _leave_terminals(self) -> None:
        """Send what is still printed to nowhere: the terminal is gone, and writing to it would be an error."""
        with Path(os.devnull).open("w") as nowhere:
            for number in self._terminals:
                os.dup2(nowhere.fileno(), number)

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
        finally:
            self._held = before

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has arrived."""
        if self.asked:
            raise KeyboardInterrupt

    def uninterrupted(self, call: Callable[[], Result]) -> Result:
        """Return what `call` returns; a signal that arrives meanwhile raises after it, unless signals are held."""
        asked = self.asked
        with self.held():
            result = call()
        if self.asked and not asked and not self._held:
            raise KeyboardInterrupt
        return result


_current: Stop | None = None


def uninterrupted(call: Callable[[], Result]) -> Result:
    """Return what `call` returns; a signal that arrives meanwhile raises KeyboardInterrupt only after it.

    Python runs signal handlers in the main thread alone, so that calls in other threads need no protection.
    """
    if _current is None or threading.current_thread() is not threading.main_thread():
        return call()
    return _current.uninterrupted(call)


def stop_asked() -> bool:
    """Return whether a signal has asked what this process does to stop."""
    return _current is not None and _current._active and _current.asked


def exit_status() -> int:
    """Return the exit status after KeyboardInterrupt: 128 and the number of the signal that asked for it."""
    return 128 + (_current.number if _current is not None and _current.asked else signal.SIGINT)
