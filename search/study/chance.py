"""Decides whether a plan still has a chance to become the best trial, and says why not."""

from __future__ import annotations

from optuna.trial import FrozenTrial

from search.setup.goal import Goal, Known
from search.show import goal_text


def why_none(goal: Goal, known: Known, best: FrozenTrial | None) -> str | None:
    """Say why a plan can't become the best trial; None where it can.

    Args:
        goal: The study's goal.
        known: What is known of the plan so far.
        best: The best feasible trial; None without one.
    """
    return misses(goal, known) or (None if best is None else _loses(goal, known, best))


def misses(goal: Goal, known: Known) -> str | None:
    """Say which bound of the goal a plan surely misses; None where it may reach them all."""
    bound = goal.broken(known)
    if bound is None:
        return None
    return f"{goal_text.of_quantity(bound.quantity, known)} stays below the goal's {bound.least:g}"


def _loses(goal: Goal, known: Known, best: FrozenTrial) -> str | None:
    value = best.value or 0.0
    if goal.can_beat(known, value):
        return None
    score = known.score
    if goal.is_score:
        return (
            f"Score {score.score:.3f} ± {score.score_se:.3f} (PerfNorm {score.perf_norm:.3f}, "
            f"SpeedNorm {score.speed_norm:.3f}) can't reach trial {best.number}'s {value:.3f}"
        )
    verb = "is not below" if goal.objective == "size" else "can't reach"
    return f"{goal_text.of_objective(goal, known)} {verb} trial {best.number}'s {goal_text.number(goal, value)}"
