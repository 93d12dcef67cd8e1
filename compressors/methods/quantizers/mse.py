"""Round to the nearest value, with the scale of least squared error."""

from __future__ import annotations

import torch

from compressors.methods import rounding
from compressors.methods.quantizers import Moment, Rounded, gptq


def round_weight(weight: torch.Tensor, moment: Moment | None, scheme: str, size: int | None) -> Rounded:
    """Round by searched scales; where H is known, each input counts by its damped mean square."""
    home = weight.device
    importance = None if moment is None else gptq.damp(moment()).diagonal()
    weight = weight if importance is None else weight.to(importance.device)
    scales = rounding.searched_scales(weight, scheme, size, importance)
    return rounding.nearest(weight, scales, scheme).to(home), scales.to(home)
