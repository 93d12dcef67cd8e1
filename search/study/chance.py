"""Decides whether a plan still has a chance to become the best trial, and says why not."""

from __future__ import annotations

from optuna.trial import FrozenTrial

from search.setup.goal import Bound, Goal, Known
from search.show import goal_text

KERNELS = 0.01  # by which PerfNorm in an engine may exceed that of the same weights in memory


def why_none(goal: Goal, known: Known, best: FrozenTrial | None) -> str | None:
    """Say why a plan can't become the best trial; None where it can.

    Args:
        goal: The study's goal.
        known: What is known of the plan so far.
        best: The trial to beat, see `search.study.best.to_beat`; None without one.
    """
    return misses(goal, known) or (None if best is None else _loses(goal, known, best))


def misses(goal: Goal, known: Known) -> str | None:
    """Say which bound of the goal a plan surely misses; None where it may reach them all."""
    bound = goal.broken(known)
    return None if bound is None else _below(bound, known)


def misses_as_screened(goal: Goal, known: Known) -> str | None:
    """Say that a plan misses the bound of PerfNorm on all of the text that it would be measured on; None: it may not.

    The sampling error of that text is not in question there: a measurement differs from the screen by its kernels.
    """
    least = goal.bound("perf_norm")
    if least is None or known.score.perf_norm >= least - KERNELS:
        return None
    return _below(Bound("perf_norm", least), known)


def _below(bound: Bound, known: Known) -> str:
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
