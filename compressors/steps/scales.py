"""Let the scales of weights that were rounded to integers learn from the base model, with all that stays in 16 bits.

The integers stay as the quantizer rounded them. A scale for each group of inputs is few parameters, and what they learn
on text of all the kinds that the model knows carries over to other text. That is the second phase of EfficientQAT
(https://arxiv.org/abs/2407.11062, section 3.3), with the base model's distributions to learn from.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from compressors.choices import Value
from compressors.device import release
from compressors.distillation import repair as distillation
from compressors.methods import precision
from compressors.methods.kept_fits import fitted
from compressors.methods.quantizers import Rounded
from compressors.model.checkpoint import Checkpoint, LazyTensor
from compressors.plan import CompressionPlan, learns_scales
from compressors.steps import Build, distill, quantize

VERSIONS: Mapping[tuple[str, Value], str] = {}  # it learns as `distill` does, whose version names it too


def applies(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Say whether the plan rounds weights alone, and repairs by a distillation."""
    return learns_scales(plan)


def shapes(made: Build) -> Build:
    """Change nothing: scales keep their shapes."""
    return made


def run(made: Build) -> Build:
    """Round and learn; that is done when a weight is first read."""
    if made.moments is None:
        return made
    plan, family, moments, device = made.plan, made.family, made.moments, made.device
    cut = precision.in_16_bits(made.checkpoint)
    second = quantize.second_moments(family, moments, made.inputs, device)
    how: dict[str, Any] = {
        "quantizer": plan.quantizer,
        "group_size": plan.group_size,
        "keep": quantize.in_16_bits(made.checkpoint, family, plan, second),
    }
    rounded = precision.rounded(cut, family, plan.precision, **how, moments=second, device=device)

    @functools.cache
    def key() -> str:
        parts = [distill.key(made), plan.precision, *how.values(), str(cut.config["dtype"])]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def fit() -> dict[str, torch.Tensor]:
        student = _rounded_student(cut, rounded, made)
        work = moments.path / f"distilling-{key()}"
        weights = distillation.repaired(student, made.base, moments.lessons(), device, work, made.say)
        release(device)
        return {**weights, **{f"{module}.weight": values for module, values in student.values.items()}}

    kept = _learnt_later(cut, rounded)
    kept = fitted(kept, distillation.names(kept) + _weights(rounded), moments.path, "scales", key, fit, made.say)

    def given(module: str) -> Rounded:
        return kept.tensors[f"{module}.weight"].load().float(), kept.tensors[f"{module}.weight_scale"].load()

    learnt = {name: _in_dtype(kept.tensors[name], cut.tensors[name].dtype) for name in cut.tensors}
    return dataclasses.replace(
        made,
        checkpoint=dataclasses.replace(cut, tensors=learnt),
        given={module: functools.partial(given, module) for module in rounded},
    )


def _in_dtype(kept: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Return integers as what they stand for, a weight, whose values no one asks for: `given` says what they are."""
    return kept if kept.dtype == dtype else kept.map(lambda values: values.to(dtype), dtype)


def _weights(rounded: Mapping[str, Any]) -> list[str]:
    return [f"{module}.weight" for module in rounded]


def _learnt_later(cut: Checkpoint, rounded: Mapping[str, tuple[LazyTensor, LazyTensor]]) -> Checkpoint:
    """Return the checkpoint with the integers in place of the weights, and the scales beside them."""
    tensors = dict(cut.tensors)
    for module, (values, scales) in rounded.items():
        tensors |= {f"{module}.weight": values, f"{module}.weight_scale": scales}
    return dataclasses.replace(cut, tensors=tensors)


def _rounded_student(cut: Checkpoint, rounded: Mapping[str, tuple[LazyTensor, LazyTensor]], made: Build) -> Checkpoint:
    """Return the checkpoint with its rounded weights as integers, which stay, and scales, which learn; in memory."""
    tensors = dict(cut.tensors)
    values: dict[str, torch.Tensor] = {}
    for number, (module, (its, scales)) in enumerate(rounded.items(), start=1):
        made.say(f"repair: rounding, projection {number} of {len(rounded)}")
        tensors[f"{module}.weight_scale"] = scales.map(torch.Tensor.cpu).loaded()
        with torch.inference_mode(False):  # what is made without gradients can't be multiplied with them
            values[module] = its.load().cpu().clone()
        del tensors[f"{module}.weight"]
    return dataclasses.replace(cut, tensors=tensors, values=values)
