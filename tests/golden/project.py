"""Where the golden tests find things in the project.

The only file of this folder that may change when code moves: it adapts names, and computes nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from compressors import build
from compressors import plan as plans
from compressors.plan import CompressionPlan
from evaluator.backends import kernels
from search.by_hand import compress
from search.config import validation
from search.setup import keys, setting
from search.stages.bench import Bench
from search.study import space

Setting = setting.Setting


def prepare(values: dict[str, Any], *, search: bool = True) -> Setting:
    """The setting of a study file's values, on a machine and an engine that have fixed names."""
    prepared = setting.prepare(validation.validate(values, "golden"), search=search)
    machine = dataclasses.replace(prepared.machine, device_name="golden device", engine_version="golden engine 1.0")
    return dataclasses.replace(prepared, machine=machine)


def identity(of: Setting) -> CompressionPlan:
    return of.model.identity


def canonical(plan: CompressionPlan, of: Setting) -> CompressionPlan:
    return plans.canonical(plan, of.model.identity)


def name_of(plan: CompressionPlan, of: Setting) -> str:
    return plans.name_of(plan, of.model.identity)


def plan_digest(plan: CompressionPlan, of: Setting) -> str:
    return keys.plan_digest(of, plan)


def key(plan: CompressionPlan, of: Setting) -> str:
    return keys.measurement_key(of, plan)


def infeasible(plan: CompressionPlan, of: Setting, *, gpu: bool, max_bytes: int | None = None) -> str | None:
    asked = kernels("vllm", "cuda") if gpu else None
    return build.check(plan, of.model.checkpoint, of.model.family, kernels=asked, max_bytes=max_bytes)


def file_bytes(plan: CompressionPlan, of: Setting) -> int:
    return build.predicted_bytes(plan, of.model.checkpoint, of.model.family)


def definition(of: Setting) -> dict[str, Any]:
    return keys.definition(of)


def suggest(trial: Any, of: Setting) -> CompressionPlan:
    return space.suggest(trial, of.file.space, of.model.identity)


def uncut(of: Setting) -> list[dict[str, Any]]:
    return space.uncut(of.file.space, of.model.identity)


def write(plan: CompressionPlan, of: Setting, to: Path) -> str:
    """Build the plan's checkpoint in `to`, as `compress` does; returns its weights' sha256."""
    return compress.compress(compress.foresee(plan, of), of, to, None).weights_sha256


def screen(plan: CompressionPlan, of: Setting) -> dict[str, Any]:
    """Quality in memory, a number a shard."""
    with Bench.of(of) as bench:
        return dataclasses.asdict(bench.screen(plan, lambda text: None))
