"""What vLLM's GPU kernels ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The sizes that a kernel takes."""

    name: str
    rows: int
    columns: int


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The sizes that an engine's kernels take."""

    engine: str
    head_dim: int
    schemes: Mapping[str, Kernel]


VLLM = Kernels(
    "vLLM",
    8,
    {"W4A16": Kernel("Marlin", 64, 128), "W8A8": Kernel("CUTLASS", 16, 16), "FP8_DYNAMIC": Kernel("CUTLASS", 16, 16)},
)


def kernels(backend: str, device: str) -> Kernels | None:
    """Return what the backend's kernels ask for on the device."""
    return VLLM if backend == "vllm" and device == "cuda" else None
