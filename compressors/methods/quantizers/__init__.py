"""Methods that round the weights of a scheme: one a file, its name that of the choice. A file offers `round_weight`.

Symbols: N output and K input width of a Linear, g group size, H = E[x xᵀ] [K, K] the second moment of its input.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Protocol, cast

import torch

Rounded = tuple[torch.Tensor, torch.Tensor]  # values float32 [N, K], scales [N, K/g]
Moment = Callable[[], torch.Tensor]  # loads H


class Quantizer(Protocol):
    """A file of this folder."""

    def round_weight(self, weight: torch.Tensor, moment: Moment | None, scheme: str, size: int | None) -> Rounded:
        """Round a weight to the grid of a scheme.

        Args:
            weight: The weight [N, K].
            moment: Loads H; None: it is not known.
            scheme: W8A8, FP8_DYNAMIC, W4A16, or W8A16 for an lm_head.
            size: The group size g; None: one scale per output channel.

        Returns:
            (values of the grid as float32 [N, K], scales in the weight's dtype [N, K/g]), on the weight's device.

        Raises:
            InfeasiblePlan: It needs H, and H is not known.
        """


def names() -> list[str]:
    """Return the quantizers that exist: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def quantizer(name: str) -> Quantizer:
    """Return the quantizer of that name."""
    return cast(Quantizer, importlib.import_module(f"{__name__}.{name}"))
