"""`doctor` tells what this machine can do: engines, devices, versions, room. It starts and writes nothing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from evaluator import backends, nvml
from search.setup import machine
from search.study import mlflow_runs

PACKAGES = (  # and what each backend names
    "optuna",
    "optuna-dashboard",
    "torch",
    "transformers",
    "compressed-tensors",
    "mlflow",
    "hydra-core",
)


def examine(outputs: Path = Path("outputs")) -> dict[str, Any]:
    """Return this machine's facts as JSON values; `outputs` is the directory whose disk is asked."""
    mlflow_runs.load_environment()
    device = machine.best_device()
    memory = machine.free_memory(device)
    place = outputs if outputs.exists() else Path()
    packages = dict.fromkeys([*PACKAGES, *(each for name in backends.names() for each in backends.packages(name))])
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "device": device,
        "device_name": machine.device_name(device),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else None,
        "free_memory_gb": None if memory is None else round(memory / 1e9, 1),
        **({"gpu": _gpu()} if device == "cuda" else {}),
        "free_disk_gb": round(shutil.disk_usage(place).free / 1e9, 1),
        "backends": {name: backends.unavailable(name) or "ready" for name in backends.names()},
        "backend": backends.choose("auto"),
        "versions": {name: _version(name) for name in packages},
        "mlflow": (os.environ.get("MLFLOW_TRACKING_URI") and "set by the environment") or "sqlite:///mlflow.db",
    }


def _gpu() -> dict[str, Any] | None:
    """Return the GPU's clock, what holds it and who else uses it; None where NVML can't be asked."""
    at = nvml.address()
    state = None if at is None else nvml.read(at)
    return None if state is None else dataclasses.asdict(state)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
