"""Functions that read a GPU's state through NVML, NVIDIA's management library.

It answers without a CUDA context, so that the process that calls the engines can ask it. Which GPU to ask about, the
engine tells (`address`): numbers of CUDA and NVML differ. Where there is no NVML, nothing is known and nothing fails.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from evaluator.gpu_state import GpuState, OtherProcess

T = TypeVar("T")

REASONS = {  # the bits of NVML, by the names that nvidia-smi has for them
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}


def address() -> str | None:
    """Return how NVML names the CUDA GPU that this process computes on: by UUID, or by PCI bus id; None without one.

    It opens CUDA in this process, so an engine calls it.
    """
    try:
        import torch

        if torch.version.hip is not None or not torch.cuda.is_available():
            return None
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        uuid = getattr(gpu, "uuid", None)
        if uuid is not None:
            return f"GPU-{str(uuid).removeprefix('GPU-')}"
        domain, bus, device = (getattr(gpu, f"pci_{part}_id") for part in ("domain", "bus", "device"))
        return f"{domain:08x}:{bus:02x}:{device:02x}.0"
    except Exception as error:  # nothing depends on it
        print(f"which GPU this is, is not known: {error}", flush=True)
        return None


def read(gpu: str) -> GpuState | None:
    """Return a GPU's state, or None where NVML can't be asked.

    Args:
        gpu: What `address` returned.
    """
    try:
        library = _opened(os.getpid())
        if library is None:
            return None
        handle = _handle(library, gpu)
    except Exception:  # no driver, another GPU than NVML sees, an older library
        return None
    return GpuState(
        sm_clock_mhz=_asked(lambda: int(library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM))),
        sm_clock_max_mhz=_asked(lambda: int(library.nvmlDeviceGetMaxClockInfo(handle, library.NVML_CLOCK_SM))),
        memory_clock_mhz=_asked(lambda: int(library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_MEM))),
        throttle_reasons=_asked(lambda: reasons_of(_mask(library, handle))),
        temperature_c=_asked(lambda: int(library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU))),
        power_w=_asked(lambda: int(library.nvmlDeviceGetPowerUsage(handle)) / 1e3),
        utilization_percent=_asked(lambda: int(library.nvmlDeviceGetUtilizationRates(handle).gpu)),
        memory_used_mb=_asked(lambda: int(library.nvmlDeviceGetMemoryInfo(handle).used) / 1e6),
        others=_asked(lambda: _others(library, handle)),
    )


def reasons_of(mask: int) -> tuple[str, ...]:
    """Return the names of the bits that are set."""
    return tuple(REASONS.get(1 << bit, f"0x{1 << bit:x}") for bit in range(mask.bit_length()) if mask >> bit & 1)


def strangers(
    listed: Sequence[tuple[int, float | None]], own: Collection[int], exists: Callable[[int], bool]
) -> tuple[OtherProcess, ...] | None:
    """Return the listed processes that are none of ours; None where that can't be told.

    In a container NVML may list the pids of the host, or none. So the pids count only where one of ours is among them:
    while something is timed, its engine is on the GPU.

    Args:
        listed: The pid and the megabytes of each process on the GPU.
        own: Our pids.
        exists: Whether a pid is that of a process that can be seen here.
    """
    if not any(pid in own for pid, _ in listed):
        return None
    others = [(pid, memory) for pid, memory in listed if pid not in own and exists(pid)]
    return tuple(OtherProcess(pid, _name(pid), memory) for pid, memory in others)


def _others(nvml: Any, handle: Any) -> tuple[OtherProcess, ...] | None:
    listed = []
    for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
        memory = getattr(process, "usedGpuMemory", None)
        listed.append((int(process.pid), None if memory is None else memory / 1e6))
    return strangers(listed, _own(), lambda pid: Path(f"/proc/{pid}").exists()) if listed else None


def _own() -> set[int]:
    """Return this process, those that it has started, and those that it was started by."""
    parents = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                parents[int(place.name)] = int(
                    (place / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
                )
            except (OSError, IndexError, ValueError):  # it has ended
                continue
    own, size = {os.getpid()}, 0
    while len(own) > size:
        size = len(own)
        own |= {pid for pid, parent in parents.items() if parent in own}
    above = parents.get(os.getpid(), 0)
    while above > 1 and above not in own:
        own.add(above)
        above = parents.get(above, 0)
    return own


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def _mask(nvml: Any, handle: Any) -> int:
    mask: int | None = _asked(lambda: int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)))  # since driver 535
    return int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) if mask is None else mask


def _asked(ask: Callable[[], T]) -> T | None:
    try:
        return ask()
    except Exception:  # not installed, or this driver or this GPU doesn't tell
        return None


def _handle(nvml: Any, gpu: str) -> Any:
    if not gpu.startswith("GPU-"):
        return nvml.nvmlDeviceGetHandleByPciBusId(gpu)
    try:
        return nvml.nvmlDeviceGetHandleByUUID(gpu)
    except nvml.NVMLError:  # CUDA has the same number for a part of a GPU (MIG)
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{gpu.removeprefix('GPU-')}")


@functools.cache
def _opened(pid: int) -> Any:
    """Return the module `pynvml`, ready to be asked in this process (a fork opens NVML anew); None without NVML."""
    return _asked(lambda: _initialized(importlib.import_module("pynvml"))) or _asked(lambda: _initialized(_of_vllm()))


def _initialized(nvml: Any) -> Any:
    nvml.nvmlInit()
    return nvml


def _of_vllm() -> Any:
    """Return the copy of pynvml that vLLM brings, without importing vLLM."""
    spec = importlib.util.find_spec("vllm")
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        file = Path(place) / "third_party" / "pynvml.py"
        if file.is_file():
            found = importlib.util.spec_from_file_location("_vllm_pynvml", file)
            if found is not None and found.loader is not None:
                module = importlib.util.module_from_spec(found)
                found.loader.exec_module(module)
                return module
    raise ImportError("neither pynvml nor vLLM is installed")
