"""Decides whether a study ends before it holds all of its trials: in time, or because nothing is left to win."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence

from optuna.trial import FrozenTrial

from search.setup.goal import Goal
from search.show import goal_text
from search.study import best
from search.study.forecast_sampler import NOTHING_LEFT, WAITS


def out_of_time(done: Sequence[FrozenTrial], left_s: float) -> str | None:
    """Say why no trial is begun any more, where `limits.time` leaves too little for one.

    Args:
        done: The finished trials.
        left_s: The seconds that are left; inf without a limit.
    """
    if left_s == math.inf:
        return None
    measured = [sum(trial.user_attrs["seconds"].values()) for trial in done if _was_measured(trial)]
    needed = sum(measured) / len(measured) if measured else 0.0
    if left_s > needed:
        return None
    if left_s <= 0:
        return "limits.time is up"
    return f"limits.time: {left_s:.0f} s are left, and a trial that is measured takes {needed:.0f} s"


def _was_measured(trial: FrozenTrial) -> bool:
    return "measure" in trial.user_attrs.get("seconds", {})


def out_of_patience(done: Sequence[FrozenTrial], patience: int | None, goal: Goal | None = None) -> str | None:
    """Say that the last trials brought no better plan, where there are `limits.patience` of them.

    As long as no trial reaches the goal's bounds, one that comes closer is a better one.
    """
    leader = next(iter(best.by_nearness(done)), None)
    if patience is None or leader is None:
        return None
    since = sum(trial.number > leader.number and WAITS not in trial.system_attrs for trial in done)
    if since < patience:
        return None
    begun = f"limits.patience: {since} trials since trial {leader.number} brought"
    if goal is None or goal.is_default:
        return f"{begun} no better Score than its {leader.value:.4f}"
    return f"{begun} none that does better than its {goal_text.of_known(goal, best.known_of(goal, leader))}"


def nothing_left(everything: Sequence[FrozenTrial], began: datetime.datetime) -> str | None:
    """Say that no plan is left which could win, where the sampler `forecast` has found that since `began`."""
    for trial in everything:
        why = trial.system_attrs.get(NOTHING_LEFT)
        if why is not None and trial.datetime_complete is not None and trial.datetime_complete > began:
            return f"no plan is left that could beat the best trial: {why}"
    return None
