"""Says in words what a trial has of what its study's goal asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evaluator.confirmed import UNDECIDED, Verdict
from search.setup.goal import Bound, Goal, Known

LABELS = {
    "score": ("Score", 4, ""),
    "perf_norm": ("PerfNorm", 3, ""),
    "speed_norm": ("SpeedNorm", 3, ""),
    "time_per_token": ("time per token", 3, " of the base model's"),
    "size": ("size", 3, " of the base model's"),
}
SMALLER = ("time_per_token", "size")  # what is one minus the value of a trial


def of_known(goal: Goal, known: Known) -> str:
    """Return the quantity that is optimized, and each that is bounded with its bound."""
    return ", ".join([of_objective(goal, known), *(of_bound(bound, known) for bound in goal.bounds)])


def of_objective(goal: Goal, known: Known) -> str:
    """Return the quantity that is optimized, with its standard error."""
    label, _, unit = LABELS[goal.objective]
    _, error = known.of(goal.objective)
    return f"{label} {number(goal, goal.value(known))}{_pm(goal.objective, error)}{unit}"


def of_bound(bound: Bound, known: Known) -> str:
    """Return a bounded quantity with its standard error and the bound, and whether it misses that."""
    value, _ = known.of(bound.quantity)
    misses = "misses " if value < bound.least else ""
    return f"{of_quantity(bound.quantity, known)} ({misses}>= {bound.least:g})"


def verdict_on_bounds(held: Sequence[tuple[Bound, Verdict]]) -> tuple[str, str]:
    """Return the verdict on all bounds together, and that on each with its numbers.

    A bound that is surely missed decides, then one of which it is not known.

    Args:
        held: The verdict on each bound, of which there is at least one.
    """
    words = {one.word for _, one in held}
    worst = next(word for word in ("MISSES", UNDECIDED, "HOLDS") if word in words)
    says = [f"{LABELS[bound.quantity][0]} >= {bound.least:g} {one.text}" for bound, one in held]
    return worst, "; ".join(says)


def of_quantity(name: str, known: Known) -> str:
    """Return PerfNorm or SpeedNorm with its standard error."""
    label, decimals, _ = LABELS[name]
    value, error = known.of(name)
    return f"{label} {value:.{decimals}f}{_pm(name, error)}"


def number(goal: Goal, value: float) -> str:
    """Return a trial's value as the quantity that people read: a size or a time as a share of the base model's."""
    _, decimals, _ = LABELS[goal.objective]
    return f"{1.0 - value if goal.objective in SMALLER else value:.{decimals}f}"


def _pm(name: str, error: float) -> str:
    """Return a standard error behind its ±; empty for a size, and where it is not known."""
    return "" if name == "size" or not math.isfinite(error) else f" ± {error:.{LABELS[name][1]}f}"
