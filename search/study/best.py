"""Chooses the best trial of a study: the best value among those that reach the goal's bounds.

Everything that needs it asks here. Values are larger for better trials whatever the goal is (`search.setup.goal`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import optuna
from optuna.trial import FrozenTrial, TrialState

from evaluator.score import Score
from search.setup.goal import Goal, Known
from search.show import goal_text


def goal_of(study: optuna.Study) -> Goal:
    """Return the goal of a study, as its storage has it; the Score of one that is older than goals."""
    return Goal.stored(study.user_attrs.get("file", {}))


def is_feasible(trial: FrozenTrial) -> bool:
    """Return whether a trial breaks none of its constraints."""
    return all(value <= 0 for value in trial.constraints.values())


def ranked(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the feasible measured trials, the best first, and the earlier one of equals."""
    return sorted(filter(is_feasible, _measured(trials)), key=lambda trial: (-_value(trial), trial.number))


def best_of(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """Return the best feasible measured trial; None without one."""
    return next(iter(ranked(trials)), None)


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the best feasible measured trial of a study; None without one."""
    return best_of(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def to_beat(study: optuna.Study) -> FrozenTrial | None:
    """Return the measured trial that others have to beat: the best one of those that hold each bound by its error.

    The best of all may hold a bound by luck. What lies between the two then decides, so it must not be ruled out.
    """
    return to_beat_of(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def to_beat_of(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """Return the trial of these that others have to beat; see `to_beat`."""
    return next(filter(_holds_by_its_error, ranked(trials)), None)


def closest_of(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """Return the measured trial that misses its bounds by the least in all; None without a measured one."""
    return next(iter(by_nearness(trials)), None)


def none_reaches(study: optuna.Study, closest: FrozenTrial) -> str:
    """Say that no trial of a study reaches its goal, and which measured one is the closest."""
    goal = goal_of(study)
    return (
        f"study {study.study_name!r} has no trial that reaches its goal ({goal}); the closest is trial "
        f"{closest.number}: {goal_text.of_known(goal, known_of(goal, closest))}"
    )


def by_nearness(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the measured trials: the feasible ones from the best on, then the others from the closest on."""
    return sorted(_measured(trials), key=lambda trial: (_missed(trial), -_value(trial), trial.number))


def score_of(trial: FrozenTrial) -> float | None:
    """Return the Score of a measured trial, whatever its study's goal; None of any other."""
    if trial.state != TrialState.COMPLETE:
        return None
    score: float | None = trial.user_attrs.get("score", trial.value)  # an attribute where the value is something else
    return score


def known_of(goal: Goal, trial: FrozenTrial) -> Known:
    """Return what the storage has of a measured trial; a number that an older version did not store is NaN."""
    numbers = {field.name: trial.user_attrs.get(field.name, math.nan) for field in dataclasses.fields(Score)}
    score = score_of(trial)
    size = 1.0 - _value(trial) if goal.objective == "size" else math.nan
    return Known(Score(**{**numbers, "score": math.nan if score is None else score}), size)


def _measured(trials: Iterable[FrozenTrial]) -> Iterable[FrozenTrial]:
    return (trial for trial in trials if trial.state == TrialState.COMPLETE)


def _holds_by_its_error(trial: FrozenTrial) -> bool:
    errors = {name: trial.user_attrs.get(f"{name}_se") or 0.0 for name in trial.constraints}
    return all(value + errors[name] <= 0 for name, value in trial.constraints.items())


def _value(trial: FrozenTrial) -> float:
    return trial.value or 0.0


def _missed(trial: FrozenTrial) -> float:
    return math.fsum(max(value, 0.0) for value in trial.constraints.values())
