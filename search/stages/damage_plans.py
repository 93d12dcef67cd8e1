"""Which plans the damage table scores: sizes, precisions, and the choices that a study searches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compressors import build
from compressors.choices import SCHEMES
from compressors.plan import CHOICES, DIMENSIONS, CompressionPlan, canonical
from search.config.space_section import Range
from search.setup.setting import Setting
from search.stages.damage_axes import QUERIES, along

LEVELS = (0.0, 0.4, 0.7)  # shares of the way from a dimension's low to its high end
LEVELS_ON_A_CPU = (0.0, 0.5)  # where one takes ten seconds
LEFT_OUT = ("distill", "kl-look-ahead")  # choices that take too long for a forecast
LEFT_OUT_ON_A_CPU = ("stream",)  # as well: two minutes for 135M parameters and few tokens, on two cores
BREAKS = 1.0  # nats per token with ridge, above which its curve says nothing of what a better repair leaves


def wanted(setting: Setting) -> list[CompressionPlan]:
    """Return the plans to score, as far as they can be built.

    Each searched size is cut to a few levels, and each searched precision made by each of its methods, with the first
    of each choice and ridge for any repair. Every other choice that goes with a cut is scored at the middle level.
    """
    own, space = setting.model.identity, setting.file.space
    searched, left_out, start = _searched(setting), _left_out(setting), _start(setting)
    plans: list[CompressionPlan] = []
    others: list[CompressionPlan] = []
    for cuts in _cuts(setting):
        plans += cuts
        for middle in cuts[len(cuts) // 2 :][:1]:
            for choice, values in searched.items():
                others += [dataclasses.replace(middle, **{choice: value}) for value in values if value not in left_out]
    for precision in space.precision or []:
        for quantizer, smoothing in itertools.product(space.quantizer, space.smoothing):
            if precision not in SCHEMES and (quantizer, smoothing) != (space.quantizer[0], space.smoothing[0]):
                continue
            plans.append(dataclasses.replace(start, precision=precision, quantizer=quantizer, smoothing=smoothing))
    distinct = dict.fromkeys(canonical(plan, own) for plan in [*plans, *others])
    return [plan for plan in distinct if plan != own and _is_buildable(setting, plan)]


def where_ridge_breaks(setting: Setting, lost: Mapping[CompressionPlan, float]) -> list[CompressionPlan]:
    """Return the strongest cut along each axis with each other repair, where it loses more than BREAKS with ridge.

    A share of a curve says little there: what ridge can't mend is lost, whatever the size. With 8 and 6 of 12 query
    heads a model of 1.5B parameters loses 1.15 and 1.58 nats per token with ridge, and .14 and .45 with `stream`.

    Args:
        setting: What the study shares.
        lost: The losses so far in nats per token, by plan.
    """
    own, passed_over = setting.model.identity, ("none", "ridge", *_left_out(setting))
    broken = {plan for plan, nll in lost.items() if plan.repair == "ridge" and nll > BREAKS}
    repairs = [repair for repair in setting.file.space.repair if repair not in passed_over]
    if not (broken and repairs):
        return []  # before any cut is laid out
    strongest = [canonical(cuts[0], own) for cuts in _cuts(setting) if len(cuts) > 1]
    found = [
        canonical(dataclasses.replace(plan, repair=repair), own)
        for plan in strongest
        if plan in broken
        for repair in repairs
    ]
    return [plan for plan in found if _is_buildable(setting, plan)]


def _left_out(setting: Setting) -> Sequence[str]:
    return LEFT_OUT if setting.machine.device == "cuda" else (*LEFT_OUT, *LEFT_OUT_ON_A_CPU)


def _searched(setting: Setting) -> dict[str, list[Any]]:
    """Return the values of each choice that the space has in a list."""
    space = setting.file.space
    return {name: getattr(space, name) for name in CHOICES if isinstance(getattr(space, name), list)}


def _start(setting: Setting) -> CompressionPlan:
    """Return the base model's plan with the first of each choice, and ridge for any repair."""
    repair = "ridge" if any(name != "none" for name in setting.file.space.repair) else "none"
    first = {name: values[0] for name, values in _searched(setting).items()}
    return dataclasses.replace(setting.model.identity, **{**first, "repair": repair})


def _cuts(setting: Setting) -> Iterator[list[CompressionPlan]]:
    """Return the cuts to the levels of each searched size, the strongest first, as far as they can be built."""
    levels, start = LEVELS if setting.machine.device == "cuda" else LEVELS_ON_A_CPU, _start(setting)
    for name in DIMENSIONS:
        cuts = _cut(start, name, setting.file.space, setting.model.identity, levels)
        yield [plan for plan in (_buildable_near(setting, cut) for cut in cuts) if plan is not None]


def _cut(
    start: CompressionPlan, name: str, space: Any, own: CompressionPlan, levels: Sequence[float]
) -> Iterator[CompressionPlan]:
    wanted, full = getattr(space, name), getattr(own, name)
    if wanted is None:
        return
    values = [wanted] if not isinstance(wanted, Range) else []
    for level in levels if isinstance(wanted, Range) else ():
        values.append(wanted.low + round((wanted.high - wanted.low) // wanted.step * level) * wanted.step)
    for value in dict.fromkeys(values):
        if value == full:
            continue
        axis, size = name, value
        if name == "num_attention_heads":
            axis, size = QUERIES, max(value // own.num_key_value_heads, 1)
        changes: dict[str, Any] = {**along(own, axis, size)}
        yield dataclasses.replace(start, **changes)


def _buildable_near(setting: Setting, plan: CompressionPlan) -> CompressionPlan | None:
    """Return the plan, or the nearest one with another hidden_size, that can be built; None without one.

    Some families want a hidden_size that their heads divide. One that fewer heads divide is searched together with
    them, and alone it still loses about what its neighbours lose.
    """
    own = setting.model.identity
    most = own.num_attention_heads if plan.hidden_size != own.hidden_size else 0
    for step in sorted(range(-most, most + 1), key=lambda step: (abs(step), step)):
        near = dataclasses.replace(plan, hidden_size=plan.hidden_size + step)
        if (step == 0 or near.hidden_size < own.hidden_size) and _is_buildable(setting, canonical(near, own)):
            return near
    return None


def _is_buildable(setting: Setting, plan: CompressionPlan) -> bool:
    return build.check(plan, setting.model.checkpoint, setting.model.family) is None
