"""Confirms the best trials of a study in fresh engine processes, on text that no search saw.

The best of many trials has had luck with its numbers. Confirmed ones are new: several pairs of fresh processes, and the
report text. They stand with the study, and `export` takes the best of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial

from compressors.plan import CompressionPlan
from search.config import compose
from search.config.study_file import StudyFile
from search.json_values import measurement_from
from search.say import Say
from search.setup.goal import Known
from search.setup.server import require_server
from search.setup.setting import Setting
from search.show import goal_text
from search.show.confirmed_row import ConfirmedRow, confirmed_by_goal
from search.stages import confirm as stage
from search.stages.confirm import Failed
from search.stages.confirmed import Asked, Model, Result
from search.study import best, dashboard, status, trials, workers

BATCHES = 3  # of confirm.top trials, until one reaches the goal's bounds


def study_file(study: optuna.Study, given: StudyFile) -> StudyFile:
    """Return the study file that the study was run with, with the confirmation and the report text of the given one."""
    stored = compose.restored(study.user_attrs["file"], f"study {study.study_name!r}")
    text = stored.text.model_copy(update={"report": given.text.report})
    own = {"storage": given.storage, "outputs": given.outputs, "confirm": given.confirm, "text": text}
    return stored.model_copy(update=own)


def choose(study: optuna.Study, top: int) -> list[FrozenTrial]:
    """Return the best measured trials of different plans that are not the base model itself, the best first."""
    chosen: dict[CompressionPlan, FrozenTrial] = {}
    for trial in best.ranked(study.get_trials(deepcopy=False)):
        if trials.is_base_model(trial):
            continue
        chosen.setdefault(CompressionPlan.from_dict(trial.user_attrs["plan"]), trial)
    return list(chosen.values())[:top]


def why_nothing(study: optuna.Study, file: StudyFile) -> str | None:
    """Say why there is nothing to confirm; None where there is."""
    if file.confirm.top == 0:
        return "confirm.top is 0: no trial is to be confirmed; name another number with --top"
    if not choose(study, 1):
        measured = best.by_nearness(study.get_trials(deepcopy=False))
        closest = next((trial for trial in measured if not trials.is_base_model(trial)), None)
        if closest is not None:
            return f"{best.none_reaches(study, closest)}. Run it for longer, or lower the bound"
        return (
            f"study {study.study_name!r} has no measured trial but the base model's, so that there is nothing to "
            "confirm; run it until another is complete"
        )
    if not file.evaluation.is_timed and file.text.report is None:
        return (
            "confirm: evaluation.speed is predicted and text.report is null, so that every number would be the "
            "trial's own; name a report text, or set evaluation.speed=measured"
        )
    return None


def confirm_study(setting: Setting, study: optuna.Study, say: Say, warn: Say) -> list[ConfirmedRow]:
    """Confirm the study's best trials; store the rows with the study and return them, the best first.

    Where a goal has bounds and none of them reaches it, those that come next are confirmed too, BATCHES times at most:
    the smallest model that reached a bound as it was measured has often done so by luck.

    What is confirmed already under the same settings is not measured again. KeyboardInterrupt loses no more than the
    pairs in flight; a later call does the rest.

    Args:
        setting: The study's setting.
        study: The study.
        say: Is called with the current step.
        warn: Is called with a warning.

    Raises:
        UsageError: `confirm.server` names what the engine does not take.
        EvaluationError: The base model's engine failed.
    """
    wanted = setting.file.confirm
    require_server(setting.file, setting.machine.backend, setting.engine_settings.max_model_len)
    asked, goal = Asked.of(setting), best.goal_of(study)
    chosen = choose(study, wanted.top * (BATCHES if goal.bounds else 1))
    rows: list[ConfirmedRow] = []
    for start in range(0, len(chosen), wanted.top):
        rows += _confirmed(asked, study, chosen[start : start + wanted.top], say, warn)
        _store(study, asked, rows)
        if any(row.score is not None and goal.reaches(row.known) for row in rows):
            break
    return confirmed_by_goal(rows, goal)


def _confirmed(
    asked: Asked, study: optuna.Study, chosen: Sequence[FrozenTrial], say: Say, warn: Say
) -> list[ConfirmedRow]:
    models = {
        Model(f"trial {trial.number}", CompressionPlan.from_dict(trial.user_attrs["plan"])): trial for trial in chosen
    }
    try:
        done, failed = stage.confirm(asked, list(models), asked.setting.file.confirm.pairs, say, warn)
    finally:
        workers.keep_best_checkpoints(study, asked.setting)
    rows = [_row(asked, models[result.model].number, result) for result in done]
    return rows + [_failed(asked, models[one.model].number, one) for one in failed]


def _row(asked: Asked, number: int, result: Result) -> ConfirmedRow:
    measured, ratio = result.measurement, result.ratio
    faster = result.faster
    goal, size = asked.setting.goal, measured.model_size_mb / result.baseline.model_size_mb
    bounds = goal_text.verdict_on_bounds(result.held) if result.held else (None, None)
    return ConfirmedRow(
        trial=number,
        plan=result.model.plan,
        key=asked.key,
        text=asked.text,
        perplexity=measured.perplexity,
        base_perplexity=result.baseline.perplexity,
        size=size,
        of_goal=None if goal.is_default else goal_text.of_known(goal, Known(result.score, size)),
        pairs=0 if ratio is None else ratio.pairs,
        taken=result.taken,
        time_per_token_ms=None if ratio is None else measured.time_per_token_ms,
        base_time_per_token_ms=None if ratio is None else measured.base_time_per_token_ms,
        **dataclasses.asdict(result.score),
        score_half=result.score_half,
        verdict=result.better.word,
        says=result.better.text,
        speed_verdict=None if faster is None else faster.word,
        speed_says=None if faster is None else faster.text,
        bounds_verdict=bounds[0],
        bounds_says=bounds[1],
        server=asked.setting.file.confirm.server or {},
        notes=result.notes,
    )


def _failed(asked: Asked, number: int, one: Failed) -> ConfirmedRow:
    return ConfirmedRow(number, one.model.plan, asked.key, failure=one.failure, reason=one.reason)


def _store(study: optuna.Study, asked: Asked, rows: Sequence[ConfirmedRow]) -> None:
    """Store the rows in place of earlier ones; those of other trials stay if they hold under the same settings."""
    new = {row.trial for row in rows}
    others = [row for row in status.confirmed_of(study) if row.trial not in new and row.key == asked.key]
    study.set_user_attr(status.CONFIRMED, [row.to_dict() for row in [*rows, *others]])
    dashboard.describe_study(
        study, measurement_from(study.user_attrs["baseline"]), asked.setting.file.score.weight_perf
    )
