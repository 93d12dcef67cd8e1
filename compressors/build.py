"""A plan and a base model → a checkpoint; and which plans can be built and served, before anything is built."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
import transformers

from compressors.errors import CheckpointError, InfeasiblePlan
from compressors.methods import (
    depth,
    ffn,
    heads,
    heads_by_kl,
    hidden,
    importance,
    layers_by_kl,
    precision,
    repair,
    rotation,
    sensitivity,
    smoothing,
    stream,
)
from compressors.model.checkpoint import Checkpoint, stock_config
from compressors.model.family import Family, head_dim, recast
from compressors.plan import CHOICES, DROP_FROM, DTYPES, SCHEMES, CompressionPlan
from compressors.statistics.activations import Calibration
from compressors.statistics.residual_streams import Stays
from compressors.statistics.second_moments import Moments, input_of, mixed

WIDTHS = ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")


def apply(
    plan: CompressionPlan,
    base: Checkpoint,
    family: Family,
    calibration: Calibration | None,
    *,
    moments: Moments | None = None,
    simulate: bool = False,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> Checkpoint:
    """The compressed checkpoint: depth, then heads, FFN and hidden size, then precision. Weights are read when used.

    What stays is chosen by `calibration` and `moments`; without them only shapes are right. simulate: quantised plans
    as a model of plain tensors that computes the same, for scoring in memory. device: of the arithmetic, and where the
    base model is run if a choice or a repair asks for that. say: told of what takes long. Raises InfeasiblePlan.
    """
    device = "cpu" if device == "mps" else device  # which has no float64
    own = CompressionPlan.identity(base.config)
    drop_from, order = plan.drop_from, None
    if drop_from in depth.BY_KL and moments is not None:
        going = own.num_hidden_layers - plan.num_hidden_layers
        ahead = drop_from == "kl-look-ahead"
        order = layers_by_kl.order(
            base, family, moments.windows(), going, moments.path, device, look_ahead=ahead, say=say
        )
    elif drop_from in depth.BY_KL or (drop_from == "importance" and calibration is None):
        drop_from = "top"  # shapes alone
    whole, by_moments = moments, "energy" if plan.importance == "kl" else plan.importance
    start, turned = base, None
    if plan.rotation == "pca" and plan.hidden_size != own.hidden_size:
        if calibration is not None and moments is not None:
            turned = rotation.principal(base, family, moments.windows(), moments.path, device, say)
            calibration = dataclasses.replace(calibration, norm_mean_square=turned.mean_square)
            moments = dataclasses.replace(moments, change=rotation.of_inputs(base, family, turned.basis))
        start = rotation.turn(base, family, turned, device)
    layers = depth.choose(own.num_hidden_layers, plan.num_hidden_layers, drop_from, calibration, order)
    made = depth.cut(start, family, layers)
    if calibration is not None:
        calibration = of_layers(calibration, family, layers)
    if moments is not None:
        moments = moments.of_layers(layers)
    size = head_dim(base.config)
    inputs: dict[str, list[torch.Tensor]] = {}  # of a projection, by its part and by layer: those that stay
    outputs: dict[str, list[torch.Tensor]] = {}
    if (plan.num_attention_heads, plan.num_key_value_heads) != (own.num_attention_heads, own.num_key_value_heads):
        before, wanted, gone = made, (plan.num_attention_heads, plan.num_key_value_heads), None
        if plan.importance == "kl" and whole is not None and plan.num_key_value_heads != own.num_key_value_heads:
            # of the whole model, so that one choice serves all depths
            energy = importance.group_energy(base, family, whole, device)
            gone = heads_by_kl.choose(
                base, family, whole.windows(), energy, plan.num_key_value_heads, whole.path, device, say=say
            )
            gone = [gone[layer] for layer in layers]
        if plan.importance == "activation" or moments is None:
            kept = heads.choose_all(made, *wanted, calibration)
        else:
            kept = importance.choose_heads(made, family, *wanted, moments, by_moments, device, gone)
        made = heads.cut(made, family, kept)
        inputs[family.o] = outputs[family.q] = [heads.inputs_of(those, size) for those in kept]
        outputs[family.k] = outputs[family.v] = [heads.outputs_of(those, size) for those in kept]
        if plan.repair == "ridge" and moments is not None:
            made = repair.take_over(made, before, family, [family.o], inputs[family.o], moments, device)
    if plan.intermediate_size != own.intermediate_size:
        before = made
        if plan.importance == "activation" or moments is None:
            channels = ffn.choose_all(made, plan.intermediate_size, calibration)
        else:
            channels = importance.choose_channels(made, family, plan.intermediate_size, moments, by_moments, device)
        made = ffn.cut(made, family, channels)
        inputs[family.down] = outputs[family.gate] = outputs[family.up] = channels
        if plan.repair == "ridge" and moments is not None:
            made = repair.take_over(made, before, family, [family.down], channels, moments, device)
    dimensions = None
    if plan.hidden_size != own.hidden_size:
        squares = None
        if calibration is not None:
            squares = [calibration.norm_mean_square[name] for name in family.residual_norms(len(layers))]
        before = made
        dimensions = hidden.choose(own.hidden_size, plan.hidden_size, calibration if turned is None else None)
        made = hidden.cut(made, family, dimensions, squares)
        inputs[family.q] = inputs[family.gate] = [dimensions] * len(layers)
        if plan.repair == "ridge" and moments is not None:
            readers = [family.q, family.k, family.v, family.gate, family.up]
            made = repair.take_over(made, before, family, readers, [dimensions] * len(layers), moments, device)
    if plan.repair == "stream" and moments is not None:
        if turned is not None and dimensions is not None:
            dimensions = turned.basis[:, dimensions]
        stays = Stays(tuple(layers), dimensions, inputs, outputs)
        made = stream.take_over(made, base, family, stays, moments, device, say)
    made = recast(made, family)
    if plan.precision in DTYPES:
        made = precision.cast(made, plan.precision)
    elif plan.precision in SCHEMES:
        second = None if moments is None else _second_moments(family, moments, inputs, device)
        if plan.smoothing == "smoothquant" and second is not None:
            made, second = smoothing.smooth(made, family, second)
        made = (precision.simulate if simulate else precision.quantize)(
            made,
            family,
            plan.precision,
            quantizer=plan.quantizer if second is not None or plan.quantizer != "gptq" else "nearest",  # shapes alone
            group_size=plan.group_size,
            keep=_unquantised(made, family, plan, second),
            lm_head_8bit=plan.lm_head == "8-bit",
            kv_cache_fp8=plan.kv_cache == "fp8",
            moments=second,
            device=device,
        )
    else:
        raise InfeasiblePlan(f"precision: {plan.precision!r} is not one of {', '.join((*DTYPES, *SCHEMES))}")
    made.config["head_dim"] = head_dim(base.config)
    made.config.setdefault("architectures", [family.architecture])
    made.config["transformers_version"] = transformers.__version__
    return made


def _second_moments(
    family: Family, moments: Moments, inputs: Mapping[str, Sequence[torch.Tensor]], device: str
) -> Callable[[str], torch.Tensor]:
    """Module name → the second moment [K, K] of its input in the cut model, all domains together."""

    @functools.lru_cache(maxsize=1)  # q, k and v have one, gate and up another
    def of_input(layer: int, stands: str) -> torch.Tensor:
        moment = mixed(moments.of(layer, stands, device))
        return (moment.take(inputs[stands][layer].to(device)) if stands in inputs else moment).second

    def second(module: str) -> torch.Tensor:
        number, _, part = module.removeprefix(f"{family.layers}.").partition(".")
        return of_input(int(number), input_of(family, part))

    return second


def _unquantised(
    made: Checkpoint, family: Family, plan: CompressionPlan, second: Callable[[str], torch.Tensor] | None
) -> list[str]:
    """The projections that stay in 16 bits; without second moments the smallest: no size is foreseen too large."""
    groups = precision.fused_groups(made, family)
    if plan.keep_16_bit and second is not None:
        groups = sensitivity.rank(made, family, plan.precision, second, group_size=plan.group_size)
    elif plan.keep_16_bit:
        groups.sort(key=lambda group: sum(made.tensors[f"{module}.weight"].nbytes for module in group))
    return [module for group in groups[: plan.keep_16_bit] for module in group]


def needs_calibration(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Whether anything of `base` is chosen by statistics of its activations."""
    depth_by_importance = plan.num_hidden_layers != base.num_hidden_layers and plan.drop_from == "importance"
    return depth_by_importance or any(getattr(plan, width) != getattr(base, width) for width in WIDTHS)


def needs_moments(plan: CompressionPlan) -> bool:
    """Whether anything of it rests on second moments (`compressors.moments`), or on the text that they are of."""
    options = plan.importance != "activation" or plan.repair != "none" or plan.drop_from in depth.BY_KL
    rounding = plan.quantizer == "gptq" or plan.smoothing != "none" or plan.keep_16_bit > 0
    return options or plan.rotation != "none" or rounding


def versions(plan: CompressionPlan) -> list[str]:
    """Of the methods that this plan is fitted by and that know one: another makes another model of the same plan."""
    repaired = [f"stream {stream.VERSION}"] if plan.repair == "stream" else []
    if plan.importance == "kl":
        repaired.append(f"heads {heads_by_kl.RULES}")
    turned = [f"rotation {rotation.VERSION}"] if plan.rotation != "none" else []
    return repaired + turned + ([f"smoothing {smoothing.VERSION}"] if plan.smoothing != "none" else [])


def of_layers(calibration: Calibration, family: Family, layers: tuple[int, ...]) -> Calibration:
    """The statistics of the layers that stay, renumbered as they are in the cut model."""
    index = list(layers)
    norms = {family.final_norm: calibration.norm_mean_square[family.final_norm]}
    for new, old in enumerate(layers):
        for norm in family.block_norms:
            norms[family.in_layer(new, norm)] = calibration.norm_mean_square[family.in_layer(old, norm)]
    return Calibration(
        block_influence=calibration.block_influence[index],
        ffn_activity=calibration.ffn_activity[index],
        head_activity=calibration.head_activity[index],
        hidden_activity=calibration.hidden_activity,
        norm_mean_square=norms,
    )


def predicted_bytes(plan: CompressionPlan, base: Checkpoint, family: Family) -> int:
    """Of model.safetensors, header included, before anything is built. Raises InfeasiblePlan."""
    return apply(plan, base, family, None).file_bytes


def check(
    plan: CompressionPlan, base: Checkpoint, family: Family, *, kernel_alignment: bool, max_bytes: int | None
) -> str | None:
    """Why the plan can't be built, loaded or served fast, or None.

    kernel_alignment: also what vLLM's GPU kernels ask for; without it vLLM falls back to slow ones silently.
    max_bytes: of model.safetensors.
    """
    own = CompressionPlan.identity(base.config)
    reason = heads.infeasible(
        own.num_attention_heads, own.num_key_value_heads, plan.num_attention_heads, plan.num_key_value_heads
    )
    if reason:
        return reason
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size"):
        wanted, there = getattr(plan, name), getattr(own, name)
        if not 1 <= wanted <= there:
            return f"{name}: {wanted} must be from 1 to the model's {there}"
    if plan.drop_from not in DROP_FROM and plan.dropped_layers is None:
        return f"drop_from: {plan.drop_from!r} is not one of {', '.join(DROP_FROM)}, nor a list of layers"
    for name in ("importance", "rotation", "repair"):
        if getattr(plan, name) not in CHOICES[name]:
            return f"{name}: {getattr(plan, name)!r} is not one of {', '.join(map(str, CHOICES[name]))}"
    reason = precision.check_options(
        plan.precision,
        smoothing=plan.smoothing,
        quantizer=plan.quantizer,
        group_size=plan.group_size,
        keep_16_bit=plan.keep_16_bit,
        lm_head=plan.lm_head,
        kv_cache=plan.kv_cache,
    )
    if reason:
        return reason
    try:
        made = apply(plan, base, family, None)
        stock_config(made.config)
    except (InfeasiblePlan, CheckpointError) as error:
        return str(error)
    if kernel_alignment:
        reason = _misaligned(plan, made, family)
        if reason:
            return reason
    return oversized(made, max_bytes)


def require_size(made: Checkpoint, max_bytes: int | None) -> None:
    """Raises InfeasiblePlan for what is `oversized`."""
    reason = oversized(made, max_bytes)
    if reason:
        raise InfeasiblePlan(reason)


def oversized(made: Checkpoint, max_bytes: int | None) -> str | None:
    """Why its model.safetensors is too large, or None. Foreseen sizes (`check`) are too small with `keep_16_bit`."""
    if max_bytes is None or made.file_bytes <= max_bytes:
        return None
    return f"size: {made.file_bytes / 1e6:.1f} MB exceeds the limit of {max_bytes / 1e6:.1f} MB (limits.max_size_mb)"


def _misaligned(plan: CompressionPlan, made: Checkpoint, family: Family) -> str | None:
    """The rules of vLLM's kernels: Marlin (W4A16) N % 64 and K % 128, CUTLASS (INT8, FP8) both % 16, attention D % 8.

    N of projections that vLLM fuses (q, k, v; gate, up) is the fused matrix's.
    """
    size = head_dim(made.config)
    if size % 8:
        return f"head_dim: {size} is no multiple of 8, which the attention kernels want"
    if plan.precision not in SCHEMES:
        return None
    n_multiple, k_multiple, kernel = (64, 128, "Marlin") if plan.precision == "W4A16" else (16, 16, "CUTLASS")
    for parts in family.fused:
        shapes = [_linear_shape(made, family.in_layer(0, part)) for part in parts]
        n, k = sum(shape[0] for shape in shapes), shapes[0][1]
        if n % n_multiple or k % k_multiple:
            names = "+".join(part.rpartition(".")[2] for part in parts)
            return (
                f"{plan.precision}: {names} is {n} × {k}, and vLLM's {kernel} kernel wants multiples of {n_multiple} × "
                f"{k_multiple}; choose sizes that give them"
            )
    return None


def _linear_shape(made: Checkpoint, module: str) -> tuple[int, int]:
    weight = made.tensors.get(f"{module}.weight")
    if weight is None:  # packed: 8 values in an int32
        rows, words = made.tensors[f"{module}.weight_packed"].shape
        return rows, words * 8
    return weight.shape[0], weight.shape[1]
