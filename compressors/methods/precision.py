"""Casts a checkpoint to another floating-point dtype, or quantizes it to a scheme of compressed-tensors.

Symbols: N output and K input width of a Linear, g group size, V vocabulary, E hidden size. Weights are symmetric: per
output channel for W8A8 and FP8_DYNAMIC, per group of g inputs for W4A16.
https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
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
Given = Mapping[str, Callable[[], Rounded]]


def cast(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Cast every floating-point tensor to `dtype` (float32, float16 or bfloat16)."""
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
    """Return the group size of W4A16: `wanted`, or with 0 the largest of 128, 64 and 32 that fits.

    A group size fits if it divides the input width of every quantized Linear.

    Args:
        checkpoint: The checkpoint to quantize.
        family: Its family.
        wanted: The group size, or 0.
        keep: The modules that stay in 16 bits.

    Raises:
        InfeasiblePlan: No group size fits.
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
    """Return the modules that a scheme quantizes: the projections of all layers, not embedding, norms and lm_head."""
    layers = int(checkpoint.config["num_hidden_layers"])
    return [family.in_layer(layer, part) for layer in range(layers) for part in family.linears]


def fused_groups(checkpoint: Checkpoint, family: Family) -> list[tuple[str, ...]]:
    """Return the projections of every layer in groups; vLLM runs a group as one matrix, with one precision."""
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
    known: dict[str, Rounded] | None = None,
    given: Given | None = None,
) -> Checkpoint:
    """Return a compressed-tensors checkpoint that stock vLLM and transformers load.

    The tensors of a quantized Linear, by scheme:

    - W8A8: weight int8 [N, K], weight_scale [N, 1]; inputs are quantized per token at run time.
    - FP8_DYNAMIC: weight float8_e4m3fn [N, K], weight_scale [N, 1]; inputs as for W8A8.
    - W4A16: weight_packed int32 [N, K/8], weight_scale [N, K/g], weight_shape int64 [2].

    Args:
        checkpoint: The checkpoint to quantize.
        family: Its family.
        scheme: The scheme.
        quantizer: "nearest", "mse" (scales with the least squared error) or "gptq", which needs `moments`.
        group_size: The group size of W4A16; 0: the largest that fits.
        keep: The modules that stay in 16 bits, in whole fused groups.
        lm_head_8bit: Whether lm_head is quantized too: by the scheme, or with W4A16 to 8 bits (W8A16). The embedding
            stays in 16 bits and is stored apart.
        kv_cache_fp8: Whether keys and values are cached as float8_e4m3fn with scale 1.
        moments: A function that returns the second moment E[x xᵀ] [K, K] of a module's input in `checkpoint`.
        device: The device on which weights are rounded, one at a time.
        known: What `simulate` has rounded by the same arguments, by module: it is taken out and not rounded again.
        given: What the weight of each quantized Linear of the layers is rounded to; None: what the quantizer says.

    Raises:
        InfeasiblePlan: The sizes, or the modules to keep, don't go with the scheme.
    """
    parameters = checkpoint.total_parameters
    size = _checked(checkpoint, family, scheme, quantizer, group_size, keep, kv_cache_fp8)
    checkpoint = in_16_bits(checkpoint)
    rounded = _Rounding(quantizer, moments, device, known, given)
    tensors = _with_linears_stored(checkpoint, family, scheme, size, keep, rounded)
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


def _with_linears_stored(
    checkpoint: Checkpoint, family: Family, scheme: str, size: int | None, keep: Collection[str], rounded: _Rounding
) -> dict[str, LazyTensor]:
    """Return the checkpoint's tensors in their order, with the weights of quantized Linears replaced."""
    quantized = {f"{name}.weight" for name in linears(checkpoint, family) if name not in keep}
    tensors: dict[str, LazyTensor] = {}
    for name, weight in checkpoint.tensors.items():
        if name in quantized:
            tensors |= _stored(name.removesuffix(".weight"), weight, scheme, size, rounded)
        else:
            tensors[name] = weight
    return tensors


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
    known: dict[str, Rounded] | None = None,
    given: Given | None = None,
) -> Checkpoint:
    """Return the quantized model for scoring in memory: dequantized weights, and activations rounded at run time.

    An FP8 cache is not simulated: keys and values stay as they are. Rounded weights stay on `device`. The arguments are
    those of `quantize`; into `known` is put what is rounded, for `quantize`.

    Raises:
        InfeasiblePlan: The sizes, or the modules to keep, don't go with the scheme.
    """
    size = _checked(checkpoint, family, scheme, quantizer, group_size, keep, kv_cache_fp8)
    checkpoint = in_16_bits(checkpoint)
    rounded = _Rounding(quantizer, moments, device, known, given)
    tensors = dict(checkpoint.tensors)
    schemes = dict.fromkeys((name for name in linears(checkpoint, family) if name not in keep), scheme)
    config = dict(checkpoint.config)
    if lm_head_8bit:
        tensors[f"{family.lm_head}.weight"] = _head(checkpoint, family)
        schemes[family.lm_head] = head_scheme(scheme)
        config["tie_word_embeddings"] = False
    for module, its in schemes.items():
        # float32, since an integer kernel multiplies by the scale last and rounds no product to 16 bits
        by = _for_head(rounded) if module == family.lm_head else rounded
        function = by.multiplied_out(module, its, size if its == "W4A16" else None)
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"].map(function, torch.float32)
    activations = {module: its for module, its in schemes.items() if its not in BITS}
    return dataclasses.replace(checkpoint, config=config, tensors=tensors, activations=activations)


def rounded(
    checkpoint: Checkpoint,
    family: Family,
    scheme: str,
    *,
    quantizer: str,
    group_size: int,
    keep: Collection[str],
    moments: Moments | None,
    device: str,
) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """Return the values, int8 [N, K], and scales [N, K/g] of each Linear that `quantize` rounds, by module.

    A module's values and scales are rounded together when one of them is loaded; load them one after the other. The
    arguments are those of `quantize`, for a checkpoint in 16 bits and a scheme of integers.

    Raises:
        InfeasiblePlan: The sizes, or the modules to keep, don't go with the scheme.
    """
    size = _checked(checkpoint, family, scheme, quantizer, group_size, keep, False)
    by = _Rounding(quantizer, moments, device)

    return {
        module: _lazily(module, checkpoint.tensors[f"{module}.weight"], scheme, size, by)
        for module in linears(checkpoint, family)
        if module not in keep
    }


def head_scheme(scheme: str) -> str:
    """Return the scheme of an 8-bit lm_head in a model whose layers have `scheme`."""
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
    """Return the quantization_config that compressed-tensors writes to config.json.

    Args:
        scheme: The scheme of the layers.
        size: The group size; None where the scheme has none.
        lm_head: The name of the lm_head module.
        keep: The modules that stay in 16 bits.
        lm_head_8bit: Whether lm_head is quantized too.
        kv_cache_fp8: Whether the cache of keys and values is FP8.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, preset_name_to_scheme

    def group(name: str, targets: list[str]) -> Any:
        preset = preset_name_to_scheme(name, targets)
        preset.format = FORMATS["W4A16" if name in BITS else name]
        return preset

    # vLLM's lm_head is no Linear: it has to be named, unlike for stock transformers
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
    """Check the arguments and return the group size, or None where the scheme has none.

    Raises:
        InfeasiblePlan: The arguments contradict each other or the model.
    """
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
        raise InfeasiblePlan(f"keep: {unknown[0]} is no projection of a layer; name one that a scheme quantizes")
    if len(set(keep)) == sum(map(len, groups)):
        raise InfeasiblePlan(
            f"keep_16_bit: all {len(groups)} projections stay in 16 bits, and nothing is quantised; keep fewer, or "
            "choose float16 or bfloat16"
        )
    return group_size(checkpoint, family, wanted, keep) if scheme == "W4A16" else None


class _Rounding:
    """Rounds one Linear at a time, and keeps the last result: values and scales are loaded one after the other."""

    def __init__(
        self,
        quantizer: str,
        moments: Moments | None,
        device: str,
        known: dict[str, Rounded] | None = None,
        given: Given | None = None,
    ) -> None:
        self.quantizer, self.moments, self.device, self.known, self.given = quantizer, moments, device, known, given
        self.last: dict[str, Rounded] = {}

    def round(self, module: str, weight: torch.Tensor, scheme: str, size: int | None) -> Rounded:
        if self.given is not None:
            values, scales = self.given[module]()
            return values.to(self.device), scales.to(self.device)
        moments = self.moments
        moment = None if moments is None else (lambda: moments(module).to(self.device))
        by = quantizers.quantizer(self.quantizer)
        return by.round_weight(weight.to(self.device), moment, scheme, size)

    def once(self, module: str, weight: LazyTensor, scheme: str, size: int | None) -> Rounded:
        if module not in self.last:
            self.last = {}  # freed first: two results would double the memory
            before = None if self.known is None else self.known.pop(module, None)
            if before is None:
                self.last = {module: self.round(module, weight.load(), scheme, size)}
            else:
                self.last = {module: (before[0].float(), before[1])}
        return self.last[module]

    def multiplied_out(self, module: str, scheme: str, size: int | None) -> Callable[[torch.Tensor], torch.Tensor]:
        def function(weight: torch.Tensor) -> torch.Tensor:
            values, scale = self.round(module, weight, scheme, size)
            if self.known is not None:
                self.known[module] = values.to(_grid(scheme)), scale
            return rounding.multiplied_out(values, scale)

        return function


def _for_head(rounded: _Rounding) -> _Rounding:
    """Return the rounding of lm_head, without GPTQ: it gains nothing at 8 bits and is slow on as many rows."""
    return _Rounding("mse" if rounded.quantizer == "gptq" else rounded.quantizer, None, rounded.device)


def _head(checkpoint: Checkpoint, family: Family) -> LazyTensor:
    """Return lm_head's weight [V, E], which is the embedding's where the two are tied."""
    own = checkpoint.tensors.get(f"{family.lm_head}.weight")
    return checkpoint.tensors[f"{family.embedding}.weight"] if own is None else own


def _stored(
    module: str, weight: LazyTensor, scheme: str, size: int | None, rounded: _Rounding
) -> dict[str, LazyTensor]:
    rows, columns = weight.shape
    values, scale = _lazily(module, weight, scheme, size, rounded)
    if scheme in BITS:
        bits = BITS[scheme]
        return {
            f"{module}.weight_packed": LazyTensor(
                (rows, math.ceil(columns * bits / 32)), torch.int32, lambda: _packed(values.load(), bits)
            ),
            f"{module}.weight_scale": scale,
            f"{module}.weight_shape": LazyTensor((2,), torch.int64, lambda: torch.tensor([rows, columns])),
        }
    return {f"{module}.weight": values, f"{module}.weight_scale": scale}


def _lazily(
    module: str, weight: LazyTensor, scheme: str, size: int | None, rounded: _Rounding
) -> tuple[LazyTensor, LazyTensor]:
    """Return the values [N, K] in the scheme's dtype of one byte, and the scales [N, K/g] in the weight's."""
    rows, columns = weight.shape
    dtype = _grid(scheme)
    values = LazyTensor((rows, columns), dtype, lambda: rounded.once(module, weight, scheme, size)[0].to(dtype))
    scales = LazyTensor(
        (rows, columns // (size or columns)), weight.dtype, lambda: rounded.once(module, weight, scheme, size)[1]
    )
    return values, scales


def _grid(scheme: str) -> torch.dtype:
    """Return a dtype of one byte that holds the values of a scheme exactly."""
    return torch.float8_e4m3fn if scheme == "FP8_DYNAMIC" else torch.int8


def _packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed: torch.Tensor = pack_to_int32(values, num_bits=bits)
    return packed


def _kv_scales(checkpoint: Checkpoint, family: Family) -> dict[str, LazyTensor]:
    """Return scales of 1 for every layer's cache: stock transformers requires them, and vLLM's default is 1."""
    attention = family.k.rpartition(".")[0]
    return {
        f"{family.in_layer(layer, attention)}.{name}": LazyTensor((1,), torch.float32, lambda: torch.ones(1))
        for layer in range(int(checkpoint.config["num_hidden_layers"]))
        for name in ("k_scale", "v_scale")
    }


def in_16_bits(checkpoint: Checkpoint) -> Checkpoint:
    """Cast to 16 bits, for scales and unquantized tensors: to float16 if the model is float16, else to bfloat16."""
    half = (checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")) == "float16"
    return cast(checkpoint, "float16" if half else "bfloat16")
