"""Waiting for what another process does.

The limits are there so that a test that would hang fails instead: a busy machine without AVX-512 is ten times slower
than a good one, and a wait that ends early is no fault of the program.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

LONG_S = 300.0  # under the time limit of a test, 600 s
AT_ONCE_S = 60.0  # what takes a moment, on any machine; far under what it would take were it not to end by itself


def until(happened: Callable[[], object], within_s: float = LONG_S, every_s: float = 0.02) -> bool:
    """Wait until `happened()` is true; return whether it became so within `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not happened():
        if time.monotonic() > deadline:
            return bool(happened())
        time.sleep(every_s)
    return True


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid: int, within_s: float = AT_ONCE_S) -> bool:
    """Wait until the process has ended; return whether it did."""
    return until(lambda: not runs(pid), within_s)
