"""Round to the nearest value, with the scale that compressed-tensors takes."""

from __future__ import annotations

import torch

from compressors.methods import rounding
from compressors.methods.quantizers import Moment, Rounded


def round_weight(weight: torch.Tensor, moment: Moment | None, scheme: str, size: int | None) -> Rounded:
    """Round by the largest magnitude over half the range (127.5, 7.5, 448), without a look at the inputs.

    The scale is rounded to its 16-bit dtype first, so that the values are the nearest to what is multiplied out.
    """
    scales = rounding.largest_scales(weight, scheme, size)
    return rounding.nearest(weight, scales, scheme), scales
