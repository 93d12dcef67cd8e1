"""Functions that ask the machine for its engine and device, and for its free memory and disk."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

from compressors.errors import CheckpointError, MachineError
from evaluator import backends
from evaluator.errors import BackendUnavailable
from search.config.study_file import StudyFile
from search.errors import UsageError

SPARE_BYTES = 50_000_000  # of disk, for what is written next to the file itself


@dataclasses.dataclass(frozen=True)
class Machine:
    """The engine and the device that a study measures with.

    Attributes:
        backend: The engine's name.
        device: cpu, cuda or mps.
        device_name: The name of the GPU or the processor.
        engine_version: The versions that decide how fast and how exactly a checkpoint runs.
        threads: Threads of each engine on a CPU, where several workers share it; None: one per core.
        capability: The compute capability of the CUDA GPU as (major, minor); None elsewhere.
        memory: The bytes of memory that the CUDA GPU has; None elsewhere.
    """

    backend: str
    device: str
    device_name: str
    engine_version: str
    threads: int | None = None
    capability: tuple[int, int] | None = None
    memory: int | None = None


def choose_engine(file: StudyFile, needed: bool) -> tuple[str, str]:
    """Return the backend and the device (cpu, cuda or mps) of a study file.

    Args:
        file: The study file.
        needed: Whether the engine will be started; if not, one that cannot run here is replaced by "auto".

    Raises:
        UsageError: The study file names a backend or a device that does not exist here.
        BackendUnavailable: The backend is needed and cannot run here.
    """
    evaluation = file.evaluation
    names = backends.names()
    if evaluation.backend != "auto" and evaluation.backend not in names:
        raise UsageError(f"evaluation.backend: {evaluation.backend!r} is not one of auto, {', '.join(names)}")
    try:
        backend = backends.choose(evaluation.backend)
    except BackendUnavailable:
        if needed:
            raise
        backend = backends.choose("auto")
    device = evaluation.device
    if device == "auto":
        device = best_device()
    if device not in ("cpu", "cuda", "mps"):
        raise UsageError(f"evaluation.device: {device!r} is not one of auto, cpu, cuda, mps")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "evaluation.device: cuda was asked for, and torch sees no CUDA GPU; see `optuna-search doctor`"
        )
    return backend, device


def best_device() -> str:
    """Return cuda, mps or cpu: the first that torch can use."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def compute_capability(device: str) -> tuple[int, int] | None:
    """Return the compute capability of the CUDA GPU as (major, minor); None on another device."""
    return torch.cuda.get_device_capability() if device == "cuda" else None


def device_name(device: str) -> str:
    """Return the name of the GPU, or of the processor with its number of cores."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({'MPS' if device == 'mps' else f'{os.cpu_count()} cores'})"


def engine_version(backend: str) -> str:
    """Return the versions that decide how fast and how exactly a checkpoint runs on a backend."""
    found = []
    for name in backends.packages(backend):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def free_memory(device: str) -> int | None:
    """Return the bytes that are free on the device, or None where that cannot be known."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch keeps it and uses it again
        return int(torch.cuda.mem_get_info()[0]) + unused
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def total_memory(device: str) -> int | None:
    """Return the bytes of memory that the device has, or None where that cannot be known."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def require_memory(needed: int, device: str, what: str) -> None:
    """Check that `needed` bytes are free on the device; `what` names their use in the message.

    Raises:
        CheckpointError: The device has less in all.
        MachineError: Less is free now; it may be more when other processes have ended.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        total = total_memory(device)
        raise (MachineError if total is not None and needed <= total else CheckpointError)(
            f"memory: {what} needs {needed / 1e9:.1f} GB on {device} and {free / 1e9:.1f} GB are "
            "free; free some, or take a smaller model"
        )


def require_disk(needed: int, directory: Path, what: str) -> None:
    """Check that `needed` bytes and some to spare are free where `directory` is or will be.

    Args:
        needed: The bytes that will be written.
        directory: The directory that they will be written to.
        what: Their use, for the message.

    Raises:
        MachineError: Less is free.
    """
    needed += SPARE_BYTES
    existing = next(place for place in (directory.absolute(), *directory.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise MachineError(
            f"disk: {what} needs {needed / 1e9:.2f} GB and {directory} has {free / 1e9:.2f} GB free; "
            "free some, or set outputs="
        ) from OSError(errno.ENOSPC, "no space left", str(directory))
