"""Reads the state of a study: progress, the best trial, the Pareto front, why other trials ended, distilled models.

It reads only the storage, and whether the distilled models still exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from evaluator.measurement import METRICS
from search.json_values import known_fields, measurement_from, plan_from
from search.show.confirmed_row import ConfirmedRow, confirmed_by_score
from search.show.study_state import (
    BestOfAll,
    Contender,
    FinalistRow,
    StudyState,
    TrialSummary,
    finalists_by_score,
)
from search.study import front
from search.study.ladder import ladder
from search.study.trials import INTERRUPTED, finished, is_base_model

CONFIRMED = "confirmed"  # the study's attribute that holds the rows of its confirmed trials (`search.confirm`)
DISTILLED = "distilled"  # the study's attribute that holds the rows of its finalists (`search.finalists`)


def of(study: optuna.Study) -> StudyState:
    """Return the state of a study."""
    trials = study.get_trials(deepcopy=False)
    done = finished(trials)
    complete = [trial for trial in done if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in done if trial.state == TrialState.PRUNED]
    best = max(complete, key=lambda trial: trial.value or 0.0, default=None)
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
        best=None if best is None else summary(best),
        pareto=tuple(summary(trial) for trial in pareto(complete)),
        pruned_at=Counter(trial.user_attrs.get("stage", "") for trial in pruned),
        ended=tuple(summary(trial) for trial in done if trial.state != TrialState.COMPLETE),
        distilled=tuple(distilled),
        best_of_all=best_of_all(best, distilled),
        stopped=sum(trial.user_attrs.get("failure") == INTERRUPTED for trial in trials),
        base_score=file.get("score", {}).get("weight_perf"),
        contenders=tuple(_contenders(complete, distilled)),
        rungs=ladder(done, file.get("text", {}).get("shards", 0)),
        confirmed=tuple(confirmed_of(study)),
        confirmed_best=confirmed_best(study),
    )


def _contenders(complete: Iterable[FrozenTrial], distilled: Iterable[FinalistRow]) -> Iterator[Contender]:
    for trial in complete:
        if not is_base_model(trial):
            errors = (trial.user_attrs.get("score_se"), trial.user_attrs.get("speed_norm_se"))
            yield Contender(f"trial {trial.number}", trial.value or 0.0, *errors)
    for row in distilled:
        if row.result is not None and is_there(row):
            after = row.result.after
            yield Contender(
                f"trial {row.trial} distilled, {row.path},", after.score, after.score_se, after.speed_norm_se
            )


def distilled_of(study: optuna.Study) -> list[FinalistRow]:
    """Return the rows of the study's distilled finalists, as its storage holds them."""
    return [FinalistRow.from_dict(values) for values in study.user_attrs.get(DISTILLED, [])]


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """Return the measured feasible trials, the best Score first."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    feasible = [trial for trial in complete if all(value <= 0 for value in trial.constraints.values())]
    return sorted(feasible, key=lambda trial: (-(trial.value or 0.0), trial.number))


def confirmed_of(study: optuna.Study) -> list[ConfirmedRow]:
    """Return the rows of the study's confirmed trials, as its storage holds them, the best first."""
    return confirmed_by_score(ConfirmedRow.from_dict(values) for values in study.user_attrs.get(CONFIRMED, []))


def confirmed_best(study: optuna.Study) -> ConfirmedRow | None:
    """Return the best confirmed trial; None where the best measured trial has not been confirmed since it was there.

    Trials of one plan are one: the first of them stands for the others.
    """
    rows = confirmed_of(study)
    best = next((trial for trial in ranked(study) if not is_base_model(trial)), None)
    if best is None or not rows or rows[0].score is None:
        return None
    plan = plan_from(best.user_attrs["plan"])
    return rows[0] if any(plan == row.plan for row in rows) else None


def best_of_all(best: FrozenTrial | None, distilled: Iterable[FinalistRow]) -> BestOfAll | None:
    """Return the best of the trials and of the distilled models that still exist; None without a measured trial."""
    if best is None:
        return None
    first = BestOfAll(best.number, None, best.value, best.user_attrs.get("score_se"))
    for row in distilled:
        if row.result is not None and row.result.after.score > (first.score or 0.0) and is_there(row):
            first = BestOfAll(row.trial, row.path, row.result.after.score, row.result.after.score_se)
    return first


def is_there(row: FinalistRow) -> bool:
    """Return whether the distilled model of this row exists; a relative path counts from the working directory."""
    return (Path(row.path) / "model.safetensors").is_file()


def summary(trial: FrozenTrial) -> TrialSummary:
    """Return what the storage holds about a trial."""
    values = known_fields(TrialSummary, trial.user_attrs)
    shown = [name for name, metric in METRICS.items() if metric.status and name in trial.user_attrs]
    plan = values.get("plan")
    return TrialSummary(
        **{
            **values,
            "trial": trial.number,
            "state": trial.state.name,
            "score": trial.value if trial.state == TrialState.COMPLETE else None,
            "metrics": {name: trial.user_attrs[name] for name in shown},
            "plan": None if plan is None else plan_from(plan),
        }
    )


def pareto(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials on the Pareto front of PerfNorm and SpeedNorm, the highest PerfNorm first."""
    return front.pareto(trials, lambda trial: (trial.user_attrs["perf_norm"], trial.user_attrs["speed_norm"]))
