"""The memory of a device."""

from __future__ import annotations

import gc

import torch


def release(device: str) -> None:
    """What torch keeps of the device's memory, an engine may want next."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
