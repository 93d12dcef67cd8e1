"""Tell the shape of weights that store several values in an integer, by quantization method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from compressors.errors import CheckpointError
from compressors.model.checkpoint import LazyTensor

PACKED = ("weight_packed", "qweight")  # names of packed weights within their module


def unpacked_shape(module: str, suffix: str, stored: Mapping[str, LazyTensor], quantization: Any) -> tuple[int, ...]:
    """Return the shape [out, in] of a weight that packs several values into an integer, else its stored shape.

    Args:
        module: The module's name, for messages.
        suffix: The weight's name within the module.
        stored: All tensors of the module, by name within it.
        quantization: The quantization_config of config.json.

    Raises:
        CheckpointError: When the stored shapes contradict each other, or the number of bits is unknown.
    """
    shape = stored[suffix].shape
    method = method_of(quantization)
    if method.startswith("bitsandbytes") and stored[suffix].dtype == torch.uint8:  # two in a byte, flat
        return (math.prod(shape) * 2,)
    if suffix not in PACKED or len(shape) != 2:
        return shape
    if "weight_shape" in stored:
        rows, columns = stored["weight_shape"].load().tolist()
        if rows != shape[0] or not 0 < columns <= shape[1] * 32:
            raise CheckpointError(
                f"weights: {module} is packed as {shape[0]} × {shape[1]} integers, but its weight_shape is {rows} × "
                f"{columns}; copy or download it again"
            )
        return rows, columns
    bits = _bits(quantization)
    if bits is None:
        raise CheckpointError(
            f"weights: {module} is packed, but quantization_config in config.json doesn't say in how many bits; copy "
            "config.json again"
        )
    if method.startswith("awq"):  # [in, out·bits/32]
        return shape[1] * 32 // bits, shape[0]
    if suffix == "qweight":  # GPTQ: [in·bits/32, out]
        return shape[1], shape[0] * 32 // bits
    return shape[0], shape[1] * 32 // bits


def method_of(quantization: Any) -> str:
    """Return the name of a quantization method: `compressed-tensors int-quantized`, `gptq`."""
    if not isinstance(quantization, dict):
        return str(quantization)
    return " ".join(str(quantization[key]) for key in ("quant_method", "format") if quantization.get(key))


def _bits(quantization: Any) -> int | None:
    if not isinstance(quantization, dict):
        return None
    groups = quantization.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    weights = groups[0].get("weights") if groups and isinstance(groups[0], dict) else None
    bits = (weights if isinstance(weights, dict) else {}).get("num_bits", quantization.get("bits"))
    return bits if isinstance(bits, int) and 0 < bits <= 32 else None
