"""Cast the weights to another dtype, or round them to a scheme."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from compressors.choices import DTYPES, Need, Value
from compressors.methods import precision, sensitivity, smoothing
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family
from compressors.plan import CHOICES, CompressionPlan
from compressors.statistics.second_moments import Moments, input_of
from compressors.steps import Build

VERSIONS: Mapping[tuple[str, Value], str] = {("smoothing", "smoothquant"): f"smoothing {smoothing.VERSION}"}


def applies(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Say yes: also a model that keeps its dtype has it written into config.json."""
    return True


def shapes(made: Build) -> Build:
    """Round to the nearest; of projections that stay in 16 bits, count the smallest."""
    return _in_precision(made, made.checkpoint, None)


def run(made: Build) -> Build:
    """Smooth where the plan says so, then round by its quantizer."""
    second = None
    if made.moments is not None:
        second = second_moments(made.family, made.moments, made.inputs, made.device)
    checkpoint = made.checkpoint
    if made.plan.smoothing == "smoothquant" and second is not None:
        checkpoint, second = smoothing.smooth(checkpoint, made.family, second)
    return _in_precision(made, checkpoint, second)


def _in_precision(made: Build, checkpoint: Checkpoint, second: precision.Moments | None) -> Build:
    plan, family = made.plan, made.family
    if plan.precision in DTYPES:
        return dataclasses.replace(made, checkpoint=precision.cast(checkpoint, plan.precision))
    fitted = Need.SECOND_MOMENTS in CHOICES["quantizer"].needs(plan.quantizer)
    rounded = (precision.simulate if made.simulate else precision.quantize)(
        checkpoint,
        family,
        plan.precision,
        quantizer="nearest" if fitted and second is None else plan.quantizer,
        group_size=plan.group_size,
        keep=in_16_bits(checkpoint, family, plan, second) if made.given is None else _not_given(made, checkpoint),
        lm_head_8bit=plan.lm_head == "8-bit",
        kv_cache_fp8=plan.kv_cache == "fp8",
        moments=second,
        device=made.device,
        known=made.rounded,
        given=made.given,
    )
    return dataclasses.replace(made, checkpoint=rounded)


def second_moments(
    family: Family, moments: Moments, inputs: Mapping[str, Sequence[torch.Tensor]], device: str
) -> Callable[[str], torch.Tensor]:
    """Return module name → the second moment [K, K] of its input in the cut model, all domains together.

    Args:
        family: The base model's family.
        moments: Second moments of the base model's layers that stay.
        inputs: Part → by layer, its inputs that stay, int64 [kept].
        device: Where they are needed.
    """

    @functools.lru_cache(maxsize=1)  # q, k and v have one, gate and up another
    def of_input(layer: int, part: str) -> torch.Tensor:
        moment = moments.mixed(layer, part, device)
        return (moment.take(inputs[part][layer].to(device)) if part in inputs else moment).second

    def second(module: str) -> torch.Tensor:
        number, _, part = module.removeprefix(f"{family.layers}.").partition(".")
        return of_input(int(number), input_of(family, part))

    return second


def _not_given(made: Build, checkpoint: Checkpoint) -> list[str]:
    """Return the projections that stay in 16 bits where others were rounded before, from weights that changed since."""
    return [module for module in precision.linears(checkpoint, made.family) if module not in (made.given or {})]


def in_16_bits(
    checkpoint: Checkpoint, family: Family, plan: CompressionPlan, second: precision.Moments | None
) -> list[str]:
    """Return the projections that stay in 16 bits.

    Without second moments they are the smallest, so that no size is predicted too large.
    """
    groups = precision.fused_groups(checkpoint, family)
    if plan.keep_16_bit and second is not None:
        groups = sensitivity.rank(checkpoint, family, plan.precision, second, group_size=plan.group_size)
    elif plan.keep_16_bit:
        groups.sort(key=lambda group: sum(checkpoint.tensors[f"{module}.weight"].nbytes for module in group))
    return [module for group in groups[: plan.keep_16_bit] for module in group]
