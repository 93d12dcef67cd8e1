"""Gathers what a study's forecast says, for people: `forecast` shows it, and `run` when it begins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from compressors.plan import CHOICES, CompressionPlan
from evaluator import backends
from search.setup.setting import Setting
from search.show.forecast_view import Best, Costs, ForecastView, Pays, Step
from search.stages import damage_axes, speed_table
from search.stages.forecast import Forecast
from search.stages.step_times import StepTimes
from search.study.forecast_sampler import ForecastSampler

SHOWN = 10  # plans


def view(made: Forecast, own_score: float, times: StepTimes, *, with_front: bool = True) -> ForecastView:
    """Return what people see of a forecast.

    Args:
        made: The forecast.
        own_score: The base model's Score.
        times: Where a step's time goes, as far as it was profiled.
        with_front: Whether the Pareto front is wanted, which takes longer than all the rest.
    """
    setting = made.setting
    base_ms = {} if made.speed is None else made.speed.base_ms
    floor_ms = _floor_ms(setting, times)
    plans = ForecastSampler(made, setting.file.seed).best_plans(SHOWN)
    fastest = ForecastSampler(made, setting.file.seed).fastest()
    by_size = setting.goal.objective == "size"
    return ForecastView(
        study=setting.file.study_name,
        device=setting.machine.device_name,
        engine=setting.machine.backend,
        base_ms=base_ms,
        floor_ms=floor_ms,
        whole_requests=setting.workload.kind != "decode",
        stands_for_server=setting.workload.kind == "serve" and made.speed is not None,
        steps=tuple(Step(size, wall, times.busy_ms.get(size), floor_ms) for size, wall in base_ms.items()),
        own_score=own_score,
        pays=_pays(made),
        costs=_costs(made),
        lossless=setting.formula.weight_perf + setting.formula.weight_speed * fastest,
        best=_forecast_of(made, plans),
        front=_forecast_of(made, ForecastSampler(made, setting.file.seed).front() if with_front else ()),
        goal=setting.goal,
        fastest=fastest,
        smallest=ForecastSampler(made, setting.file.seed).smallest() if by_size else math.nan,
    )


def _forecast_of(made: Forecast, plans: Sequence[CompressionPlan]) -> tuple[Best, ...]:
    size_ratio = made.setting.size_ratio
    return tuple(Best(**dataclasses.asdict(made.expected(plan)), plan=plan, size=size_ratio(plan)) for plan in plans)


def _pays(made: Forecast) -> tuple[Pays, ...]:
    setting, table = made.setting, made.speed
    if table is None:
        return ()
    own = setting.model.identity
    rows = []
    for precision in dict.fromkeys([own.precision, *(setting.file.space.precision or [])]):
        plan = dataclasses.replace(own, precision=precision)
        shape = speed_table.shape_of(setting, plan)
        ratio, error = made.time_ratio(plan)
        less, _ = table.time_ratio(dataclasses.replace(shape, num_hidden_layers=shape.num_hidden_layers - 1))
        parts = {size: dataclasses.asdict(table.parts(shape, size)) for size in table.base_ms}
        rows.append(Pays(precision, ratio, error, ratio - less, parts))
    return tuple(rows)


def _costs(made: Forecast) -> tuple[Costs, ...]:
    table = made.damage
    if table is None:
        return ()
    return tuple(
        Costs(
            change=_change(entry.plan, table.own),
            nll=entry.loss.nll,
            nll_se=entry.loss.nll_se,
            kl=entry.loss.kl,
            own_kl=entry.loss.own_kl,
            perf_norm=float(np.exp(-entry.loss.nll)),
            speed_norm=1.0 - made.time_ratio(entry.plan)[0],
        )
        for entry in table.entries
    )


def _change(plan: CompressionPlan, own: CompressionPlan) -> str:
    """Return how a plan differs from the base model, in words."""
    theirs, base = damage_axes.axes(plan), damage_axes.axes(own)
    words = [f"{name} {theirs[name]:g} of {base[name]:g}" for name in base if theirs[name] != base[name]]
    if plan.precision != own.precision:
        words.append(plan.precision)
    words += [
        record.short.format(getattr(plan, name))
        for name, record in CHOICES.items()
        if getattr(plan, name) != record.default
    ]
    return " ".join(words)


def _floor_ms(setting: Setting, times: StepTimes) -> float | None:
    """Return the time that the GPU takes to read the base model's weights once; None where that isn't known."""
    if times.bytes_per_s is None:
        return None
    stored, precision = setting.model.checkpoint.decode_bytes, setting.model.identity.precision
    return 1e3 * backends.served_bytes(setting.machine.backend, stored, precision) / times.bytes_per_s
