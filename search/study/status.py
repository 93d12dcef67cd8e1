"""Reads the state of a study: progress, the best trial, the Pareto front, why other trials ended, distilled models.

It reads only the storage, and whether the distilled models still exist.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from evaluator.measurement import METRICS
from evaluator.score import Score
from search.json_values import known_fields, measurement_from, plan_from
from search.setup.goal import Goal, Known
from search.show import goal_text
from search.show.confirmed_row import ConfirmedRow, confirmed_by_goal
from search.show.study_state import (
    BestOfAll,
    Contender,
    FinalistRow,
    StudyState,
    TrialSummary,
    finalists_by_score,
)
from search.study import best, front
from search.study.ladder import ladder
from search.study.trials import INTERRUPTED, finished, is_base_model

CONFIRMED = "confirmed"  # the study's attribute that holds the rows of its confirmed trials (`search.confirm`)
SCORES = tuple(field.name for field in dataclasses.fields(Score))
DISTILLED = "distilled"  # the study's attribute that holds the rows of its finalists (`search.finalists`)


def of(study: optuna.Study) -> StudyState:
    """Return the state of a study."""
    trials = study.get_trials(deepcopy=False)
    done = finished(trials)
    complete = [trial for trial in done if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in done if trial.state == TrialState.PRUNED]
    goal = best.goal_of(study)
    leader, closest = best.best_of(complete), best.closest_of(complete)
    baseline = study.user_attrs.get("baseline")
    file = study.user_attrs.get("file", {})
    distilled = finalists_by_score(distilled_of(study))
    return StudyState(
        study=study.study_name,
        trials=file.get("trials"),
        finished=len(done),
        complete=len(complete),
        pruned=len(pruned),
        failed=sum(trial.state == TrialState.FAIL for trial in done),
        running=sum(trial.state == TrialState.RUNNING for trial in trials),
        waiting=sum(trial.state == TrialState.WAITING for trial in trials),
        baseline=None if baseline is None else measurement_from(baseline),
        best=None if leader is None else summary(leader, goal),
        pareto=tuple(summary(trial, goal) for trial in pareto(complete)),
        pruned_at=Counter(trial.user_attrs.get("stage", "") for trial in pruned),
        ended=tuple(summary(trial, goal) for trial in done if trial.state != TrialState.COMPLETE),
        distilled=tuple(distilled),
        best_of_all=best_of_all(leader, distilled, goal),
        stopped=sum(trial.user_attrs.get("failure") == INTERRUPTED for trial in trials),
        base_score=file.get("score", {}).get("weight_perf"),
        contenders=tuple(_contenders(complete, distilled)),
        rungs=ladder(done, file.get("text", {}).get("shards", 0), goal),
        confirmed=tuple(confirmed_of(study)),
        confirmed_best=confirmed_best(study),
        confirmed_miss=confirmed_miss(study),
        goal=goal,
        closest=None if closest is None or leader is not None else summary(closest, goal),
    )


def _contenders(complete: Iterable[FrozenTrial], distilled: Iterable[FinalistRow]) -> Iterator[Contender]:
    for trial in complete:
        if not is_base_model(trial):
            errors = (trial.user_attrs.get("score_se"), trial.user_attrs.get("speed_norm_se"))
            yield Contender(f"trial {trial.number}", best.score_of(trial) or 0.0, *errors)
    for row in distilled:
        if row.result is not None and is_there(row):
            after = row.result.after
            yield Contender(
                f"trial {row.trial} distilled, {row.path},", after.score, after.score_se, after.speed_norm_se
            )


def distilled_of(study: optuna.Study) -> list[FinalistRow]:
    """Return the rows of the study's distilled finalists, as its storage holds them."""
    return [FinalistRow.from_dict(values) for values in study.user_attrs.get(DISTILLED, [])]


def confirmed_of(study: optuna.Study) -> list[ConfirmedRow]:
    """Return the rows of the study's confirmed trials, as its storage holds them, the best first."""
    rows = [ConfirmedRow.from_dict(values) for values in study.user_attrs.get(CONFIRMED, [])]
    return confirmed_by_goal(rows, best.goal_of(study))


def confirmed_best(study: optuna.Study) -> ConfirmedRow | None:
    """Return the best confirmed trial; None where the best measured trial has not been confirmed since it was there.

    Trials of one plan are one: the first of them stands for the others. One that misses the goal's bounds is no best.
    """
    rows = confirmed_of(study)
    if not rows or rows[0].score is None or not best.goal_of(study).reaches(rows[0].known):
        return None
    return None if _of_leader(study, rows) is None else rows[0]


def confirmed_miss(study: optuna.Study) -> ConfirmedRow | None:
    """Return the best measured trial as confirmed, where no confirmed trial reaches the goal's bounds; else None."""
    rows = confirmed_of(study)
    if not rows or best.goal_of(study).reaches(rows[0].known):
        return None
    row = _of_leader(study, rows)
    return None if row is None or row.score is None else row


def _of_leader(study: optuna.Study, rows: Sequence[ConfirmedRow]) -> ConfirmedRow | None:
    """Return the row of the best measured trial's plan, the base model's apart; None where it was not confirmed."""
    measured = best.ranked(study.get_trials(deepcopy=False))
    leader = next((trial for trial in measured if not is_base_model(trial)), None)
    if leader is None:
        return None
    plan = plan_from(leader.user_attrs["plan"])
    return next((row for row in rows if row.plan == plan), None)


def best_of_all(
    leader: FrozenTrial | None, distilled: Iterable[FinalistRow], goal: Goal | None = None
) -> BestOfAll | None:
    """Return the best of the trials and of the distilled models that still exist; None without a feasible trial.

    A distilled model has the size of its trial, so that a goal of size keeps the trial.
    """
    if leader is None:
        return None
    goal = goal or Goal()
    value = leader.value or 0.0
    first = BestOfAll(leader.number, None, best.score_of(leader), leader.user_attrs.get("score_se"))
    for row in distilled:
        if row.result is None or goal.objective == "size":
            continue
        after = row.result.after
        known = Known(Score(**{name: _known(getattr(after, name)) for name in SCORES}))
        if goal.value(known) > value and goal.reaches(known) and is_there(row):
            first, value = BestOfAll(row.trial, row.path, after.score, after.score_se), goal.value(known)
    return first


def _known(number: float | None) -> float:
    return math.nan if number is None else number


def is_there(row: FinalistRow) -> bool:
    """Return whether the distilled model of this row exists; a relative path counts from the working directory."""
    return (Path(row.path) / "model.safetensors").is_file()


def summary(trial: FrozenTrial, goal: Goal | None = None) -> TrialSummary:
    """Return what the storage holds about a trial of a study with a goal; None: its Score alone counts."""
    values = known_fields(TrialSummary, trial.user_attrs)
    shown = [name for name, metric in METRICS.items() if metric.status and name in trial.user_attrs]
    plan = values.get("plan")
    return TrialSummary(
        **{
            **values,
            **({} if goal is None or goal.is_default else _of_goal(trial, goal)),
            "trial": trial.number,
            "state": trial.state.name,
            "score": best.score_of(trial),
            "metrics": {name: trial.user_attrs[name] for name in shown},
            "plan": None if plan is None else plan_from(plan),
        }
    )


def _of_goal(trial: FrozenTrial, goal: Goal) -> dict[str, Any]:
    """Return what a trial has of what a goal asks for; a pruned one has estimates of its constraints."""
    names = [bound.quantity for bound in goal.bounds if bound.quantity in trial.constraints]
    values: dict[str, Any] = {"constraints": {name: trial.constraints[name] for name in names} or None}
    if trial.state == TrialState.COMPLETE:
        result = goal_text.of_known(goal, best.known_of(goal, trial))
        values |= {"value": trial.value, "feasible": best.is_feasible(trial), "result": result}
    return values


def pareto(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials on the Pareto front of PerfNorm and SpeedNorm, the highest PerfNorm first."""
    return front.pareto(trials, lambda trial: (trial.user_attrs["perf_norm"], trial.user_attrs["speed_norm"]))
