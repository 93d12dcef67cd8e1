"""Functions that tell engines about this machine: its cores and its processor's name."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def physical_cores() -> int:
    """Return the cores that this process may use; hyper-threads of one core count once, since more only add noise."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # macOS
        return max((os.cpu_count() or 2) // 2, 1)
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(cpu))
    return max(len(siblings), 1)


def processor() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
