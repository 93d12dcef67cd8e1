"""Tell what is wrong with a tensor that holds NaN or infinity."""

from __future__ import annotations

import torch


def flaw_of(tensor: torch.Tensor) -> str | None:
    """Return what a tensor holds that is not finite, with counts and its largest finite value; None if it is finite."""
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return None
    values = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # few operations know 8-bit numbers
    least, most = torch.aminmax(values)  # one pass without memory; NaN wins
    if torch.isfinite(least) and torch.isfinite(most):
        return None
    nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
    finite = values[values.isfinite()]
    largest = f"; the largest finite magnitude is {float(finite.abs().max()):g}" if finite.numel() else ""
    return f"holds {nan} NaN and {infinite} infinite among {values.numel()} values{largest}"
