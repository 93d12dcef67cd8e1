"""Functions that an engine asks, in its own process, how long its GPU computes and how fast it reads memory.

The busy time is the union of the intervals in which a kernel or a copy ran, as torch's profiler reports them; kernels
within CUDA graphs are reported one by one. Wall time beyond it is the host's. Profiling may slow down what the process
launches later, so an engine that is asked this is not timed afterwards. Where profiling fails, nothing is known.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

SETTLED = 3  # decode steps before those that are profiled, as in a timing (speed.DISCARDED)
COPIED_BYTES = 1 << 30
COPIES = 10
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # the categories of a trace in which the GPU is busy


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals (start, end), in their unit."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


def busy_us(trace: Mapping[str, Any]) -> float:
    """Return the microseconds in which the GPU was busy in a trace of torch's profiler (Chrome's trace format)."""
    return union(
        (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and str(event.get("cat", "")).lower() in ON_GPU
    )


def busy_ms(work: Callable[[], object], steps: int) -> float | None:
    """Return the milliseconds of a step in which the GPU is busy; None where that can't be profiled.

    Args:
        work: A function that runs the steps; it is called once.
        steps: Their number.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    cuda = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=cuda):  # the profiler's own start takes seconds
            torch.ones(1, device="cuda").add_(1)
            torch.cuda.synchronize()
        with torch.profiler.profile(activities=cuda) as profiler:
            work()
            torch.cuda.synchronize()  # the last step's kernels too
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "trace.json"
            profiler.export_chrome_trace(str(path))
            busy = busy_us(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    except Exception as error:  # no CUPTI, no rights, no memory: nothing depends on it
        print(f"the GPU's busy time is not known: {type(error).__name__}: {error}", flush=True)
        return None
    return busy / 1e3 / steps if busy > 0.0 else None


def bytes_per_s() -> float | None:
    """Return how many bytes a second the GPU's memory moves: the fastest of some copies, each read and written once.

    Reading alone can be a little faster.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    event: Any = torch.cuda.Event
    try:
        source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        milliseconds: list[float] = []
        for _ in range(COPIES + 1):
            began, ended = (event(enable_timing=True) for _ in range(2))
            began.record()
            target.copy_(source)
            ended.record()
            torch.cuda.synchronize()
            milliseconds.append(began.elapsed_time(ended))
        del source, target
        torch.cuda.empty_cache()
    except Exception as error:  # no memory left: nothing depends on it
        print(f"the GPU's bandwidth is not known: {type(error).__name__}: {error}", flush=True)
        return None
    return 2 * COPIED_BYTES / (1e-3 * min(milliseconds[1:]))
