"""Choose the dtype that a device computes in, and give its unused memory back."""

from __future__ import annotations

import gc

import torch


def compute_dtype(device: str) -> torch.dtype | None:
    """Return the dtype to run a model in on `device`: float32 on a CPU, else None, which keeps the model's own.

    Most CPUs compute 16-bit dtypes slowly, and too coarsely to compare models by.
    """
    return torch.float32 if device == "cpu" else None


def release(device: str) -> None:
    """Collect garbage, and return the memory that torch caches on a GPU, so that an engine can allocate it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
