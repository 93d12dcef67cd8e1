"""Suggests a CompressionPlan for a trial.

`compressors.build.check` decides which of the suggested plans can be built and served.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from compressors.plan import CHOICES, DIMENSIONS, CompressionPlan, canonical
from search.config.space_section import Range, Space

# The order in which they are suggested; a sampler's draws depend on it. drop_from comes before precision.
NAMED = tuple(name for name, record in CHOICES.items() if not record.is_number and name != "drop_from")
MOST_LISTED = 1000  # combinations of a space that are listed to count its plans
NUMBERS = tuple(name for name, record in CHOICES.items() if record.is_number)


def distributions(space: Space, base: CompressionPlan) -> dict[str, BaseDistribution]:
    """Return what is searched, in the order in which it is suggested.

    Ordered values are integers, so that their ranges may change later.
    """
    searched: dict[str, BaseDistribution] = {}

    def add(name: str, wanted: Any) -> None:
        if isinstance(wanted, Range):
            searched[name] = IntDistribution(wanted.low, wanted.high, step=wanted.step)
        elif isinstance(wanted, list) and len(wanted) > 1:
            searched[name] = CategoricalDistribution(wanted)

    for name in DIMENSIONS:
        add(name, getattr(space, name))
    add("drop_from", space.drop_from)
    add("precision", space.precision or [base.precision])
    for name in (*NAMED, *NUMBERS):
        add(name, getattr(space, name))
    return searched


def suggest(trial: optuna.Trial, space: Space, base: CompressionPlan) -> CompressionPlan:
    """Return the plan that this trial tries."""
    params: dict[str, Any] = {}
    for name, searched in distributions(space, base).items():
        if isinstance(searched, IntDistribution):
            params[name] = trial.suggest_int(name, searched.low, searched.high, step=searched.step)
        elif isinstance(searched, CategoricalDistribution):
            params[name] = trial.suggest_categorical(name, searched.choices)
    return plan_of(params, space, base)


def plan_of(params: Mapping[str, Any], space: Space, base: CompressionPlan) -> CompressionPlan:
    """Return the plan of a trial's parameters; what is not searched is as the space or the base model has it."""
    values: dict[str, Any] = {}
    for name in (*DIMENSIONS, "drop_from", "precision", *NAMED, *NUMBERS):
        fixed = getattr(space, name)
        if isinstance(fixed, list):
            fixed = fixed[0]
        values[name] = params[name] if name in params else getattr(base, name) if fixed is None else fixed
    heads, groups = int(values["num_attention_heads"]), int(values["num_key_value_heads"])
    if isinstance(space.num_attention_heads, Range) or space.num_attention_heads is None:
        values["num_attention_heads"] = shareable(heads, groups, base)
    return canonical(CompressionPlan.from_dict(values), base)


def shareable(heads: int, groups: int, base: CompressionPlan) -> int:
    """Return the most query heads, at most `heads`, that `groups` key/value heads can share evenly.

    No key/value head gets more query heads than in the base model. A sampler draws both numbers independently, and
    most pairs could not be built.
    """
    return min(max(heads // groups, 1), base.num_attention_heads // base.num_key_value_heads) * groups


def uncut(space: Space, base: CompressionPlan) -> list[dict[str, int | str]]:
    """Return the parameters of the trials that cut nothing: one for each precision, the base model's own first."""
    params: dict[str, int | str] = {}
    for name in DIMENSIONS:
        wanted, own = getattr(space, name), getattr(base, name)
        if isinstance(wanted, Range):
            if not (wanted.low <= own <= wanted.high and (own - wanted.low) % wanted.step == 0):
                return []
            params[name] = own
        elif wanted is not None and wanted != own:
            return []
    if len(space.drop_from) > 1:
        params["drop_from"] = space.drop_from[0]
    params |= {name: getattr(space, name)[0] for name in NAMED if len(getattr(space, name)) > 1}
    params |= {name: wanted.low for name in NUMBERS if isinstance(wanted := getattr(space, name), Range)}
    precisions = sorted(space.precision or [base.precision], key=lambda name: name != base.precision)
    return [params | ({"precision": name} if len(precisions) > 1 else {}) for name in precisions]


def searched(space: Space) -> list[str]:
    """Return what is searched, each with its values as people write them."""
    return [f"{name} {text}" for name, (text, _) in _dimensions(space).items()]


def count_plans(space: Space, base: CompressionPlan) -> tuple[int, bool]:
    """Return the number of plans in the space, and whether it is exact: choices that make no difference count once.

    A large space is not listed: then it is the number of combinations, which is no less.
    """
    values = {name: choices for name, (_, choices) in _dimensions(space).items()}
    combinations = math.prod(map(len, values.values()))
    if combinations > MOST_LISTED:
        return combinations, False
    each = itertools.product(*values.values())
    plans = {plan_of(dict(zip(values, one, strict=True)), space, base) for one in each}
    return len(plans), True


def _dimensions(space: Space) -> dict[str, tuple[str, Sequence[Any]]]:
    """Return the text and the values of everything that is suggested."""
    found: dict[str, tuple[str, Sequence[Any]]] = {}
    for name in (*DIMENSIONS, "drop_from", "precision", *NAMED, *NUMBERS):
        wanted = getattr(space, name)
        if isinstance(wanted, Range):
            step = "" if wanted.step == 1 else f" by {wanted.step}"
            found[name] = (f"{wanted.low}..{wanted.high}{step}", range(wanted.low, wanted.high + 1, wanted.step))
        elif isinstance(wanted, list) and len(wanted) > 1:
            found[name] = ("|".join(map(str, wanted)), wanted)
    return found
