"""GpuState holds what is known of a GPU at one moment, and GpuRecord what it did while something was timed.

A clock is throttled where NVML, NVIDIA's management library, names a hardware or thermal slowdown. A power cap and an
idle GPU's low clock are none of these: small cards run at their cap all the time. See "Clocks Event Reasons" in
https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

SLOWDOWNS = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
THROTTLED_SHARE = 0.25  # of the reads: the fastest twentieth of the steps leaves out what is shorter


@dataclasses.dataclass(frozen=True)
class OtherProcess:
    """A process on the GPU that is none of ours.

    Attributes:
        pid: Its process id.
        name: Its name; empty where that can't be read.
        memory_mb: The megabytes of the GPU's memory that it has; None where NVML doesn't tell.
    """

    pid: int
    name: str = ""
    memory_mb: float | None = None


@dataclasses.dataclass(frozen=True)
class GpuState:
    """A GPU at one moment; what NVML doesn't tell is None.

    Attributes:
        sm_clock_mhz: The clock of its multiprocessors.
        sm_clock_max_mhz: Their highest clock.
        memory_clock_mhz: The clock of its memory.
        throttle_reasons: What holds the clocks, by the names of nvidia-smi.
        temperature_c: The temperature in degrees Celsius.
        power_w: The power in watts.
        utilization_percent: The share of the last moments in which a kernel ran.
        memory_used_mb: The memory that all processes have together.
        others: The processes that are none of ours; None where pids can't be compared, as in most containers.
    """

    sm_clock_mhz: int | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    utilization_percent: int | None = None
    memory_used_mb: float | None = None
    others: tuple[OtherProcess, ...] | None = None

    @property
    def throttled_by(self) -> tuple[str, ...]:
        """The reasons that make a timing too long; empty where there is none, or none is known."""
        known = self.throttle_reasons or ()
        return tuple(reason for reason in known if reason in SLOWDOWNS)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GpuState:
        """Return the state that `dataclasses.asdict` made JSON of."""
        found = dict(values)
        if found.get("throttle_reasons") is not None:
            found["throttle_reasons"] = tuple(found["throttle_reasons"])
        if found.get("others") is not None:
            found["others"] = tuple(OtherProcess(**other) for other in found["others"])
        return cls(**found)


@dataclasses.dataclass(frozen=True)
class GpuRecord:
    """What the GPU did while something was timed on it.

    Attributes:
        before: Its state before the first turn.
        after: Its state right after the last one.
        reads: How often it was read between turns that count, and after the last.
        throttled: How many of these reads found the clock throttled.
        throttled_by: The reasons.
        lowest_sm_clock_mhz: The lowest clock of the multiprocessors in these reads.
        others: The processes of others that were seen in any read; None where pids can't be compared.
        taken_again: How often the timing was taken again because the clock was throttled.
    """

    before: GpuState
    after: GpuState
    reads: int
    throttled: int = 0
    throttled_by: tuple[str, ...] = ()
    lowest_sm_clock_mhz: int | None = None
    others: tuple[OtherProcess, ...] | None = None
    taken_again: int = 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the times less sure, a sentence each."""
        found = []
        if throttled_too_often(self.throttled, self.reads):
            clock = ""
            if self.lowest_sm_clock_mhz is not None and self.after.sm_clock_max_mhz is not None:
                clock = f", down to {self.lowest_sm_clock_mhz} of {self.after.sm_clock_max_mhz} MHz"
            again = f", and so it was {self.taken_again} times before" if self.taken_again else ""
            found.append(
                f"the GPU's clock was throttled during the timing ({', '.join(self.throttled_by)}{clock}){again}: the "
                "times are longer than this GPU's; cool it or raise its power limit, and measure again"
            )
        if self.others:
            named = ", ".join(_named(other) for other in self.others)
            found.append(f"other processes were on the GPU during the timing ({named}): stop them, and measure again")
        return tuple(found)

    @property
    def summary(self) -> str:
        """The record in a line, for the settings of a report."""
        after = self.after
        parts = [
            None if after.sm_clock_mhz is None else f"SM clock {after.sm_clock_mhz} of {after.sm_clock_max_mhz} MHz",
            None if after.throttle_reasons is None else f"reasons: {', '.join(after.throttle_reasons) or 'none'}",
            None if after.temperature_c is None else f"{after.temperature_c} °C",
            None if after.power_w is None else f"{after.power_w:.0f} W",
            f"throttled in {self.throttled} of {self.reads} reads",
            f"taken again {self.taken_again} times" if self.taken_again else None,
            f"other processes: {'unknown' if self.others is None else len(self.others)}",
        ]
        return ", ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GpuRecord:
        """Return the record that `to_dict` wrote."""
        found = dict(values)
        found["before"], found["after"] = GpuState.from_dict(found["before"]), GpuState.from_dict(found["after"])
        found["throttled_by"] = tuple(found.get("throttled_by", ()))
        if found.get("others") is not None:
            found["others"] = tuple(OtherProcess(**other) for other in found["others"])
        return cls(**found)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _named(other: OtherProcess) -> str:
    memory = "" if other.memory_mb is None else f", {other.memory_mb:,.0f} MB"
    return f"{other.name or 'a process'}, pid {other.pid}{memory}"


def throttled_too_often(throttled: int, reads: int) -> bool:
    """Return whether so many of the reads found the clock throttled that the timing is spoiled."""
    return throttled > 0 and throttled >= THROTTLED_SHARE * reads
