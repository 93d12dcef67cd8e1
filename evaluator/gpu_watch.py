"""GpuWatch reads a GPU before, between and after the turns of a timing, and has throttled turns taken again."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from evaluator import nvml
from evaluator.gpu_state import GpuRecord, GpuState, throttled_too_often

T = TypeVar("T")

AGAIN = 2  # how often a timing under a throttled clock is taken again
PAUSE_S = 5.0  # in which the GPU may cool before that
EVERY_S = 1.0  # between two reads


class GpuWatch:
    """Reads a GPU before, between and after the turns of a timing, and takes throttled turns again.

    Args:
        read: A function that returns the GPU's state, or None where it can't be known.
        every_s: The seconds between two reads, at least.
        pause_s: The seconds of rest before turns are taken again.
    """

    def __init__(self, read: Callable[[], GpuState | None], every_s: float = EVERY_S, pause_s: float = PAUSE_S) -> None:
        self._read, self._every_s, self._pause_s = read, every_s, pause_s
        self._before = read()
        self._last = time.monotonic()
        self._kept: list[GpuState] = []  # reads during turns that count
        self._now: list[GpuState] = []  # reads during the turns that are being taken
        self._again = 0

    @classmethod
    def of(cls, facts: Mapping[str, str]) -> GpuWatch:
        """Return a watch over the GPU that an engine's facts name; without one it sees nothing."""
        gpu = facts.get("gpu")
        return cls((lambda: None) if gpu is None else functools.partial(nvml.read, gpu))

    def look(self) -> None:
        """Read the state, unless that was done a moment ago. Call it between two turns."""
        if self._before is not None and time.monotonic() - self._last >= self._every_s:
            self._see()

    def steady(self, take: Callable[[], T]) -> T:
        """Return what `take` returns; it is called again while the clock was throttled, at most AGAIN times in all."""
        while True:
            self._now = []
            taken = take()
            self._see()
            throttled = sum(bool(state.throttled_by) for state in self._now)
            if not throttled_too_often(throttled, len(self._now)) or self._again == AGAIN:
                self._kept += self._now
                return taken
            self._again += 1
            time.sleep(self._pause_s)

    @property
    def record(self) -> GpuRecord | None:
        """What was seen during the turns that count; None where nothing could be read."""
        if self._before is None or not self._kept:
            return None
        throttled = [state for state in self._kept if state.throttled_by]
        clocks = [state.sm_clock_mhz for state in self._kept if state.sm_clock_mhz is not None]
        seen = [state.others for state in (self._before, *self._kept) if state.others is not None]
        return GpuRecord(
            before=self._before,
            after=self._kept[-1],
            reads=len(self._kept),
            throttled=len(throttled),
            throttled_by=tuple(dict.fromkeys(reason for state in throttled for reason in state.throttled_by)),
            lowest_sm_clock_mhz=min(clocks, default=None),
            others=tuple({other.pid: other for others in seen for other in others}.values()) if seen else None,
            taken_again=self._again,
        )

    def _see(self) -> None:
        state = None if self._before is None else self._read()
        self._last = time.monotonic()
        if state is not None:
            self._now.append(state)
