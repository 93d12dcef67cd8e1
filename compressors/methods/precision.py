"""Precision: another floating-point dtype, or a compressed-tensors scheme: how each weight is rounded, and what stays.

Symbols: N output and K input width of a Linear, g group size, V vocabulary, E hidden size. Weights are symmetric: per
output channel for W8A8 and FP8_DYNAMIC, per group of g inputs for W4A16.
https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import torch

from compressors.errors import InfeasiblePlan
from compressors.methods import quantizers, rounding
from compressors.methods.quantizers import Rounded
from compressors.model.checkpoint import Checkpoint, LazyTensor
from compressors.model.family import Family

FORMATS = {"W8A8": "int-quantized", "FP8_DYNAMIC": "float-quantized", "W4A16": "pack-quantized"}
GROUP_SIZES = (128, 64, 32)
BITS = {"W4A16": 4, "W8A16": 8}  # of packed weights

Moments = Callable[[str], torch.Tensor]


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


def group_size(checkpoint: Checkpoint, family: Family, wanted: int = 0, keep: Collection[str] = ()) -> int:
    """Of W4A16: `wanted`, or with 0 the largest of 128, 64, 32, if it divides the input width of every quantised
    Linear. Raises InfeasiblePlan.
    """
    names = [name for name in linears(checkpoint, family) if name not in keep]
    widths = sorted({checkpoint.tensors[f"{name}.weight"].shape[1] for name in names})
    for size in (wanted,) if wanted else GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    if wanted:
        raise InfeasiblePlan(
            f"group_size: {wanted} does not divide every input width of {widths}; choose multiples of it, or 0 for the "
            "largest group that fits"
        )
    raise InfeasiblePlan(
        f"W4A16: no group size of {', '.join(map(str, GROUP_SIZES))} divides every input width of {widths}; "
        "choose multiples of 32"
    )


def linears(checkpoint: Checkpoint, family: Family) -> list[str]:
    """The modules that a scheme quantises: every projection of every layer; embedding, norms and lm_head stay."""
    layers = int(checkpoint.config["num_hidden_layers"])
    return [family.in_layer(layer, part) for layer in range(layers) for part in family.linears]


def fused_groups(checkpoint: Checkpoint, family: Family) -> list[tuple[str, ...]]:
    """The projections of every layer, those together that vLLM runs as one matrix and that share one precision."""
    layers = int(checkpoint.config["num_hidden_layers"])
    return [tuple(family.in_layer(layer, part) for part in parts) for layer in range(layers) for parts in family.fused]


def quantize(
    checkpoint: Checkpoint,
    family: Family,
    scheme: str,
    *,
    quantizer: str = "nearest",
    group_size: int = 0,
    keep: Collection[str] = (),
    lm_head_8bit: bool = False,
    kv_cache_fp8: bool = False,
    moments: Moments | None = None,
    device: str = "cpu",
) -> Checkpoint:
    """A compressed-tensors checkpoint as stock vLLM and transformers load it, by scheme:

    W8A8: weight int8 [N, K], weight_scale [N, 1]; inputs are quantised per token when it runs.
    FP8_DYNAMIC: weight float8_e4m3fn [N, K], weight_scale [N, 1]; the same.
    W4A16: weight_packed int32 [N, K/8], weight_scale [N, K/g], weight_shape int64 [2].

    quantizer: "nearest", "mse" (scales of least squared error) or "gptq", which asks `moments` for the second moment
        E[x xᵀ] [K, K] of each Linear's input, by module name, in the checkpoint as it is given here.
    group_size: of W4A16; 0: the largest that fits. keep: modules that stay in 16 bits, whole fused groups alone.
    lm_head_8bit: lm_head too, apart from the embedding, which stays in 16 bits: by the scheme, or with W4A16 weights
        in 8 bits (W8A16). kv_cache_fp8: keys and values are cached as float8_e4m3fn with scale 1.
    device: where weights are rounded; one at a time is there. Raises InfeasiblePlan.
    """
    parameters = checkpoint.total_parameters
    size = _checked(checkpoint, family, scheme, quantizer, group_size, keep, kv_cache_fp8)
    checkpoint = in_16_bits(checkpoint)
    rounded = _Rounding(quantizer, moments, device)
    quantised = {f"{name}.weight" for name in linears(checkpoint, family) if name not in keep}
    tensors: dict[str, LazyTensor] = {}
    for name, weight in checkpoint.tensors.items():
        if name in quantised:
            tensors |= _stored(name.removesuffix(".weight"), weight, scheme, size, rounded)
        else:
            tensors[name] = weight
    config = dict(checkpoint.config)
    if lm_head_8bit:
        head = _head(checkpoint, family)
        tensors.pop(f"{family.lm_head}.weight", None)
        tensors |= _stored(family.lm_head, head, head_scheme(scheme), None, _for_head(rounded))
        config["tie_word_embeddings"] = False
    if kv_cache_fp8:
        tensors |= _kv_scales(checkpoint, family)
    config["quantization_config"] = quantization_config(
        scheme, size, family.lm_head, keep=keep, lm_head_8bit=lm_head_8bit, kv_cache_fp8=kv_cache_fp8
    )
    return dataclasses.replace(checkpoint, config=config, tensors=tensors, parameters=parameters)


def simulate(
    checkpoint: Checkpoint,
    family: Family,
    scheme: str,
    *,
    quantizer: str = "nearest",
    group_size: int = 0,
    keep: Collection[str] = (),
    lm_head_8bit: bool = False,
    kv_cache_fp8: bool = False,
    moments: Moments | None = None,
    device: str = "cpu",
) -> Checkpoint:
    """The same model for scoring in memory: weights rounded and multiplied out, activations rounded as they come.

    An FP8 cache is not imitated: keys and values stay as they are. Rounded weights stay on `device`.
    """
    size = _checked(checkpoint, family, scheme, quantizer, group_size, keep, kv_cache_fp8)
    checkpoint = in_16_bits(checkpoint)
    rounded = _Rounding(quantizer, moments, device)
    tensors = dict(checkpoint.tensors)
    schemes = dict.fromkeys((name for name in linears(checkpoint, family) if name not in keep), scheme)
    config = dict(checkpoint.config)
    if lm_head_8bit:
        tensors[f"{family.lm_head}.weight"] = _head(checkpoint, family)
        schemes[family.lm_head] = head_scheme(scheme)
        config["tie_word_embeddings"] = False
    for module, its in schemes.items():
        # float32: an integer kernel multiplies by the scale last, and rounds no product to 16 bits
        by = _for_head(rounded) if module == family.lm_head else rounded
        function = by.multiplied_out(module, its, size if its == "W4A16" else None)
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"].map(function, torch.float32)
    activations = {module: its for module, its in schemes.items() if its not in BITS}
    return dataclasses.replace(checkpoint, config=config, tensors=tensors, activations=activations)


def head_scheme(scheme: str) -> str:
    """Of an 8-bit lm_head beside layers of `scheme`."""
    return "W8A16" if scheme == "W4A16" else scheme


def quantization_config(
    scheme: str,
    size: int | None,
    lm_head: str,
    *,
    keep: Collection[str] = (),
    lm_head_8bit: bool = False,
    kv_cache_fp8: bool = False,
) -> dict[str, Any]:
    """As compressed-tensors writes it into config.json."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, preset_name_to_scheme

    def group(name: str, targets: list[str]) -> Any:
        preset = preset_name_to_scheme(name, targets)
        preset.format = FORMATS["W4A16" if name in BITS else name]
        return preset

    # vLLM's lm_head is no Linear: unlike stock transformers it knows this module by its name alone
    own_scheme = lm_head_8bit and head_scheme(scheme) == scheme
    groups = {"group_0": group(scheme, ["Linear", lm_head] if own_scheme else ["Linear"])}
    if size is not None:
        groups["group_0"].weights.group_size = size
    if lm_head_8bit and not own_scheme:
        groups["group_1"] = group(head_scheme(scheme), [lm_head])
        groups["group_1"].weights = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True)
    cache = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    config = QuantizationConfig(
        config_groups=groups,
        ignore=[*([] if lm_head_8bit else [lm_head]), *sorted(keep)],
        format=FORMATS[scheme],
        quantization_status="compressed",
        kv_cache_scheme=cache if kv_cache_fp8 else None,
    )
    return dict(config.to_dict())


def _checked(
    checkpoint: Checkpoint,
    family: Family,
    scheme: str,
    quantizer: str,
    wanted: int,
    keep: Collection[str],
    kv_cache_fp8: bool,
) -> int | None:
    """The group size, None where a scheme has none. Raises InfeasiblePlan."""
    if scheme not in FORMATS:
        raise InfeasiblePlan(f"precision: {scheme!r} is not one of {', '.join(FORMATS)}")
    if quantizer not in quantizers.names():
        raise InfeasiblePlan(f"quantizer: {quantizer!r} is not one of {', '.join(quantizers.names())}")
    if kv_cache_fp8 and not family.fp8_cache:
        raise InfeasiblePlan(
            f"kv_cache: vLLM runs a {family.model_type} through its transformers backend, which has no place for the "
            "scales of an FP8 cache; choose auto"
        )
    groups = fused_groups(checkpoint, family)
    for parts in groups:
        kept = [part for part in parts if part in keep]
        if kept and len(kept) < len(parts):
            raise InfeasiblePlan(
                f"keep: {kept[0]} stays in 16 bits without {next(part for part in parts if part not in keep)}, and "
                "vLLM runs them as one matrix; keep all of them"
            )
    unknown = sorted(set(keep) - {part for parts in groups for part in parts})
    if unknown:
        raise InfeasiblePlan(f"keep: {unknown[0]} is no projection of a layer; name those that a scheme quantises")
    if len(set(keep)) == sum(map(len, groups)):
        raise InfeasiblePlan(
            f"keep_16_bit: all {len(groups)} projections stay in 16 bits, and nothing is quantised; keep fewer, or "
            "choose float16 or bfloat16"
        )
    return group_size(checkpoint, family, wanted, keep) if scheme == "W4A16" else None


class _Rounding:
    """Rounds one Linear at a time, and remembers the last one: its values and its scales are asked for one by one."""

    def __init__(self, quantizer: str, moments: Moments | None, device: str) -> None:
        self.quantizer, self.moments, self.device = quantizer, moments, device
        self.last: dict[str, Rounded] = {}

    def of(self, module: str, weight: torch.Tensor, scheme: str, size: int | None) -> Rounded:
        moments = self.moments
        moment = None if moments is None else (lambda: moments(module).to(self.device))
        by = quantizers.quantizer(self.quantizer)
        return by.round_weight(weight.to(self.device), moment, scheme, size)

    def once(self, module: str, weight: LazyTensor, scheme: str, size: int | None) -> Rounded:
        if module not in self.last:
            self.last = {}  # first: two at a time would double the memory
            self.last = {module: self.of(module, weight.load(), scheme, size)}
        return self.last[module]

    def multiplied_out(self, module: str, scheme: str, size: int | None) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda weight: rounding.multiplied_out(*self.of(module, weight, scheme, size))


def _for_head(rounded: _Rounding) -> _Rounding:
    """8 bits lose too little for GPTQ to win anything back, and the embedding's rows are many."""
    return _Rounding("mse" if rounded.quantizer == "gptq" else rounded.quantizer, None, rounded.device)


def _head(checkpoint: Checkpoint, family: Family) -> LazyTensor:
    """lm_head's weight [V, E], which is the embedding's where the two are tied."""
    own = checkpoint.tensors.get(f"{family.lm_head}.weight")
    return checkpoint.tensors[f"{family.embedding}.weight"] if own is None else own


def _stored(
    module: str, weight: LazyTensor, scheme: str, size: int | None, rounded: _Rounding
) -> dict[str, LazyTensor]:
    rows, columns = weight.shape

    def values(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        return lambda: rounded.once(module, weight, scheme, size)[0].to(dtype)

    scale = LazyTensor(
        (rows, columns // (size or columns)), weight.dtype, lambda: rounded.once(module, weight, scheme, size)[1]
    )
    if scheme in BITS:
        bits = BITS[scheme]
        return {
            f"{module}.weight_packed": LazyTensor(
                (rows, math.ceil(columns * bits / 32)), torch.int32, lambda: _packed(values(torch.int8)(), bits)
            ),
            f"{module}.weight_scale": scale,
            f"{module}.weight_shape": LazyTensor((2,), torch.int64, lambda: torch.tensor([rows, columns])),
        }
    dtype = torch.int8 if scheme == "W8A8" else torch.float8_e4m3fn
    return {f"{module}.weight": LazyTensor((rows, columns), dtype, values(dtype)), f"{module}.weight_scale": scale}


def _packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed: torch.Tensor = pack_to_int32(values, num_bits=bits)
    return packed


def _kv_scales(checkpoint: Checkpoint, family: Family) -> dict[str, LazyTensor]:
    """1 for every layer: stock transformers misses them otherwise, and vLLM takes 1 where there is none."""
    attention = family.k.rpartition(".")[0]
    return {
        f"{family.in_layer(layer, attention)}.{name}": LazyTensor((1,), torch.float32, lambda: torch.ones(1))
        for layer in range(int(checkpoint.config["num_hidden_layers"]))
        for name in ("k_scale", "v_scale")
    }


def in_16_bits(checkpoint: Checkpoint) -> Checkpoint:
    """Scales and what stays unquantised are 16-bit: float16 if the model is, else bfloat16."""
    half = (checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")) == "float16"
    return cast(checkpoint, "float16" if half else "bfloat16")
