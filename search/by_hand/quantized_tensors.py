"""Checks that the tensors of a checkpoint that compressed-tensors quantized are complete and fit each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compressors.errors import CheckpointError
from compressors.model import family
from compressors.model.checkpoint import LazyTensor
from readers.errors import ReadError
from readers.quantization_groups import group_of, is_among

UNPACKED = ("int-quantized", "float-quantized", "naive-quantized")  # a weight in its own shape, and its scale
PACKED = "pack-quantized"  # several numbers in an int32


def understood(quantization: Any) -> bool:
    """Return whether a `quantization_config` uses formats that are known here.

    Raises:
        CheckpointError: It says compressed-tensors, and compressed-tensors can't read it.
    """
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "compressed-tensors":
        return False
    from compressed_tensors.quantization import QuantizationConfig

    try:
        QuantizationConfig.model_validate(dict(quantization))
    except ValueError as error:
        first = " ".join(str(error).split())[:160]
        raise CheckpointError(f"quantization_config can't be read ({first}); quantize the model again") from None
    groups = (quantization.get("config_groups") or {}).values()
    formats = {quantization.get("format"), *(group.get("format") for group in groups if isinstance(group, Mapping))}
    return formats <= {*UNPACKED, PACKED, None} and all(isinstance(group, Mapping) for group in groups)


def unpacked(
    tensors: Mapping[str, LazyTensor], quantization: Mapping[str, Any]
) -> tuple[dict[str, LazyTensor], set[str]]:
    """Return the tensors that the model had before it was quantized, and the names of its quantized modules.

    The returned weights have the right shapes [N, K] (outputs, inputs) and can't be loaded.

    Raises:
        CheckpointError: A tensor of a quantized weight is missing, or has a shape that doesn't fit.
    """
    modules: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    found: dict[str, LazyTensor] = {}
    quantized = set()
    for module, parts in modules.items():
        weight = parts.get("weight")
        packed = "weight_packed" in parts
        if not packed and (weight is None or weight.dtype in family.FLOATS) and "weight_scale" not in parts:
            found |= {
                f"{module}.{part}": tensor
                for part, tensor in parts.items()
                if not (quantization.get("kv_cache_scheme") and part in ("k_scale", "v_scale"))
            }
            continue
        wanted = ("weight_packed", "weight_scale", "weight_shape") if packed else ("weight", "weight_scale")
        for part in wanted:
            if part not in parts:
                raise CheckpointError(f"{module}.{part} is missing; quantize the model again")
        if packed and parts["weight_shape"].shape != (2,):
            raise CheckpointError(
                f"{module}.weight_shape is {_times(parts['weight_shape'].shape) or 'a scalar'}, and not two numbers; "
                "quantize the model again"
            )
        shape = tuple(parts["weight_shape"].load().tolist()) if packed else parts["weight"].shape
        if len(shape) != 2:
            raise CheckpointError(f"{module} is quantized and not a matrix ({_times(shape)}); quantize the model again")
        rows, columns = shape
        _require_fitting(module, rows, columns, parts, _bits(module, quantization) if packed else None)
        found[f"{module}.weight"] = LazyTensor((rows, columns), torch.bfloat16, torch.Tensor)
        found |= {f"{module}.{part}": tensor for part, tensor in parts.items() if part == "bias"}
        quantized.add(module)
    return found, quantized


def _require_fitting(module: str, rows: int, columns: int, parts: Mapping[str, LazyTensor], bits: int | None) -> None:
    """Require weight_packed [N, K·bits/32], and weight_scale [1], [N] or [N, groups]."""
    if bits is not None and parts["weight_packed"].shape != (rows, math.ceil(columns * bits / 32)):
        raise CheckpointError(
            f"{module}.weight_packed is {_times(parts['weight_packed'].shape)}, and {bits} bits of {rows} × {columns} "
            f"want {rows} × {math.ceil(columns * bits / 32)}; quantize the model again"
        )
    scale = parts["weight_scale"].shape
    if 0 in scale or (scale and scale[0] not in (1, rows) and rows % scale[0]):
        raise CheckpointError(
            f"{module}.weight_scale is {_times(scale)}, which doesn't fit {rows} × {columns}; quantize the model again"
        )


def is_quantized(module: str, quantization: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` says that `module` is quantized.

    Names in its `ignore` and `targets` are a module's, a class's, or `re:` and a pattern.
    """
    try:
        ignored = is_among(module, quantization.get("ignore") or ())
    except ReadError as error:
        raise CheckpointError(str(error)) from None
    return not ignored and _group(module, quantization) is not None


def _group(module: str, quantization: Mapping[str, Any]) -> Mapping[str, Any] | None:
    try:
        return group_of(module, quantization)
    except ReadError as error:
        raise CheckpointError(str(error)) from None


def _bits(module: str, quantization: Mapping[str, Any]) -> int | None:
    bits = ((_group(module, quantization) or {}).get("weights") or {}).get("num_bits")
    return bits if isinstance(bits, int) else None


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))
