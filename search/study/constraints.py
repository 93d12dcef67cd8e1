"""Stores how far a trial is from what it must reach, as samplers and dashboards read it: 0 or less is feasible."""

from __future__ import annotations

import math

import optuna

from search.setup.goal import Goal, Known

FEASIBLE = "feasible"  # the constraint of a plan that can be built, served and exported


def of_plan(trial: optuna.Trial, infeasible: str | None) -> None:
    """Store whether the plan can be built, served and exported."""
    _store(trial, {FEASIBLE: 1.0 if infeasible else 0.0})


def of_goal(trial: optuna.Trial, goal: Goal, known: Known) -> None:
    """Store bound − value of each bounded quantity, as far as anything is known of it."""
    values = {name: value for name, value in goal.constraints(known).items() if math.isfinite(known.of(name)[1])}
    if values:
        _store(trial, values)


def _store(trial: optuna.Trial, values: dict[str, float]) -> None:
    known = trial.constraints
    for name, value in values.items():
        if name not in known:  # a trial that an older version queued again keeps the value it had
            trial.set_constraint(name, value)
    # optuna-dashboard 0.21 reads only the list that constraints_func used to leave
    named = {name: value for name, value in {**known, **values}.items() if not name.isdigit()}
    trial.storage.set_trial_system_attr(trial._trial_id, "constraints", list(named.values()))
