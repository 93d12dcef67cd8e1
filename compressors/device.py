"""Choose what a device computes in, what is kept in its memory, and give unused memory back."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

import torch

FEW_WINDOWS, TOKENS_AT_ONCE = 4, 16384
SHARE_OF_FREE, SHARE_OF_ALL = 4, 8  # of a GPU's memory, at most one part in so many holds what waits
NEW_MODULES = 100
_set_aside = {"modules": 0}  # how many modules were imported when the collector last set aside what was there


def compute_dtype(device: str) -> torch.dtype | None:
    """Return the dtype to run a model in on `device`: float32 on a CPU, else None, which keeps the model's own.

    Most CPUs compute 16-bit dtypes slowly, and too coarsely to compare models by.
    """
    return torch.float32 if device == "cpu" else None


def batch_of(device: str, window: int) -> int:
    """Return how many windows of so many tokens run at once: enough to fill a GPU, and few on a CPU."""
    return max(FEW_WINDOWS, TOKENS_AT_ONCE // window) if device.startswith("cuda") else FEW_WINDOWS


def home(device: str, needed: int) -> str:
    """Return where to keep `needed` bytes that are read again soon: on the GPU, or in main memory.

    They stay on the GPU where they take less than a quarter of its free memory, and an eighth of all.
    """
    if not device.startswith("cuda"):
        return "cpu"
    free, total = torch.cuda.mem_get_info()
    return device if needed < min(free // SHARE_OF_FREE, total // SHARE_OF_ALL) else "cpu"


@contextlib.contextmanager
def tensor_cores(device: torch.device | str) -> Iterator[None]:
    """Let float32 products on a GPU round their factors to 11 bits (TF32), and add up in float32.

    Factors that come from bfloat16 are exact in 11 bits, so that only float32 ones lose anything: one part in 2,000 of
    each, at random. An H100 is eight times faster so.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in main memory; from a GPU through locked pages, which is several times as fast."""
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def release(device: str) -> None:
    """Collect garbage, and return the memory that torch caches on a GPU, so that an engine can allocate it.

    What is there after a collection is set aside from later ones, once for every NEW_MODULES modules that are imported:
    going through what torch, transformers and MLflow hold took 0.25 to 0.4 s of each call.
    """
    gc.collect()
    if len(sys.modules) >= _set_aside["modules"] + NEW_MODULES and sys.exc_info()[0] is None:  # it may hold a model
        gc.freeze()
        _set_aside["modules"] = len(sys.modules)
    if device == "cuda":
        torch.cuda.empty_cache()
