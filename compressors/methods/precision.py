"""Precision: another floating-point dtype, or a compressed-tensors scheme, rounded to the nearest.

Symbols: N output and K input width of a Linear, g group size. Weights are symmetric: per output channel for W8A8 and
FP8_DYNAMIC, per group of g inputs for W4A16. https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from compressors.checkpoint import Checkpoint, LazyTensor
from compressors.errors import InfeasiblePlan
from compressors.family import Family

FORMATS = {"W8A8": "int-quantized", "FP8_DYNAMIC": "float-quantized", "W4A16": "pack-quantized"}
GROUP_SIZES = (128, 64, 32)


def cast(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Every floating-point tensor in `dtype` (float32, float16, bfloat16)."""
    wanted: torch.dtype = getattr(torch, dtype)
    tensors = {
        name: tensor.map(_cast_to(wanted), wanted)
        if tensor.dtype.is_floating_point and tensor.dtype != wanted
        else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    config = {key: value for key, value in checkpoint.config.items() if key != "torch_dtype"} | {"dtype": dtype}
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


def _cast_to(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.to(dtype)


def group_size(checkpoint: Checkpoint, family: Family) -> int:
    """The largest of 128, 64, 32 that divides every Linear's input width. Raises InfeasiblePlan."""
    widths = sorted({checkpoint.tensors[f"{name}.weight"].shape[1] for name in linears(checkpoint, family)})
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise InfeasiblePlan(
        f"W4A16: no group size of {', '.join(map(str, GROUP_SIZES))} divides every input width of {widths}; "
        "choose multiples of 32"
    )


def linears(checkpoint: Checkpoint, family: Family) -> list[str]:
    """The modules that a scheme quantises: every projection of every layer; embedding, norms and lm_head stay."""
    layers = int(checkpoint.config["num_hidden_layers"])
    return [family.in_layer(layer, part) for layer in range(layers) for part in family.linears]


def quantize(checkpoint: Checkpoint, family: Family, scheme: str) -> Checkpoint:
    """A compressed-tensors checkpoint as stock vLLM and transformers load it, by scheme:

    W8A8: weight int8 [N, K], weight_scale [N, 1]; inputs are quantised per token when it runs.
    FP8_DYNAMIC: weight float8_e4m3fn [N, K], weight_scale [N, 1]; the same.
    W4A16: weight_packed int32 [N, K/8], weight_scale [N, K/g], weight_shape int64 [2].
    """
    parameters = checkpoint.total_parameters
    checkpoint = _in_16_bits(checkpoint)
    size = group_size(checkpoint, family) if scheme == "W4A16" else None
    tensors: dict[str, LazyTensor] = {}
    quantised = {f"{name}.weight" for name in linears(checkpoint, family)}
    for name, weight in checkpoint.tensors.items():
        if name in quantised:
            tensors |= _stored(name.removesuffix(".weight"), weight, scheme, size)
        else:
            tensors[name] = weight
    config = {**checkpoint.config, "quantization_config": quantization_config(scheme, size, family.lm_head)}
    return dataclasses.replace(checkpoint, config=config, tensors=tensors, parameters=parameters)


def simulate(checkpoint: Checkpoint, family: Family, scheme: str) -> Checkpoint:
    """The same model for scoring in memory: weights rounded and multiplied out, activations rounded as they come."""
    checkpoint = _in_16_bits(checkpoint)
    size = group_size(checkpoint, family) if scheme == "W4A16" else None
    tensors = dict(checkpoint.tensors)
    names = linears(checkpoint, family)
    for name in names:
        # float32: an integer kernel multiplies by the scale last, and rounds no product to 16 bits
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].map(_rounded(scheme, size), torch.float32)
    activations = {} if scheme == "W4A16" else dict.fromkeys(names, scheme)
    return dataclasses.replace(checkpoint, tensors=tensors, activations=activations)


def round_weight(weight: torch.Tensor, scheme: str, size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(integers or float8 values as float32 [N, K], scales in the weight's dtype [N, K/g]; g = K but for W4A16).

    The scale is the largest magnitude over half the range (127.5, 7.5, 448), as compressed-tensors has it, rounded to
    its 16-bit dtype first, so that the values are the nearest to what is multiplied out.
    """
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, -1, size or columns)  # (N, K/g, g)
    half_range = {"W8A8": 127.5, "FP8_DYNAMIC": 448.0, "W4A16": 7.5}[scheme]
    scale = (groups.abs().amax(dim=-1) / half_range).to(weight.dtype)  # (N, K/g)
    scale = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
    values = groups / scale.float()[..., None]
    if scheme == "FP8_DYNAMIC":
        values = values.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    else:
        bits = 8 if scheme == "W8A8" else 4
        values = values.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return values.reshape(rows, columns), scale


def quantization_config(scheme: str, size: int | None, lm_head: str) -> dict[str, Any]:
    """As compressed-tensors writes it into config.json."""
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    preset = preset_name_to_scheme(scheme, ["Linear"])
    preset.format = FORMATS[scheme]
    if size is not None:
        preset.weights.group_size = size
    config = QuantizationConfig(
        config_groups={"group_0": preset}, ignore=[lm_head], format=FORMATS[scheme], quantization_status="compressed"
    )
    return dict(config.to_dict())


def _stored(module: str, weight: LazyTensor, scheme: str, size: int | None) -> dict[str, LazyTensor]:
    rows, columns = weight.shape

    def values(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        return lambda: round_weight(weight.load(), scheme, size)[0].to(dtype)

    scale = LazyTensor(
        (rows, columns // (size or columns)), weight.dtype, lambda: round_weight(weight.load(), scheme, size)[1]
    )
    if scheme == "W4A16":
        return {
            f"{module}.weight_packed": LazyTensor(
                (rows, math.ceil(columns / 8)), torch.int32, lambda: _packed(values(torch.int8)())
            ),
            f"{module}.weight_scale": scale,
            f"{module}.weight_shape": LazyTensor((2,), torch.int64, lambda: torch.tensor([rows, columns])),
        }
    dtype = torch.int8 if scheme == "W8A8" else torch.float8_e4m3fn
    return {f"{module}.weight": LazyTensor((rows, columns), dtype, values(dtype)), f"{module}.weight_scale": scale}


def _packed(values: torch.Tensor) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed: torch.Tensor = pack_to_int32(values, num_bits=4)
    return packed


def _rounded(scheme: str, size: int | None) -> Callable[[torch.Tensor], torch.Tensor]:
    def rounded(weight: torch.Tensor) -> torch.Tensor:
        values, scale = round_weight(weight, scheme, size)
        by_group = values.reshape(len(weight), scale.shape[1], -1)
        return (by_group * scale.float()[..., None]).reshape(weight.shape)

    return rounded


def _in_16_bits(checkpoint: Checkpoint) -> Checkpoint:
    """Scales and what stays unquantised are 16-bit: float16 if the model is, else bfloat16."""
    half = (checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")) == "float16"
    return cast(checkpoint, "float16" if half else "bfloat16")
