"""Writes what optuna-dashboard shows: a note and a measurement file for every trial, and a note for the study.

Notes are Markdown.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.trial import FrozenTrial

from evaluator.measurement import METRICS, Measurement
from evaluator.metrics import shown
from search.setup.goal import Goal
from search.show import baseline_text, goal_text
from search.study import best, status
from search.study.steady import SteadyStorage

if TYPE_CHECKING:
    from search.study.record import Record


def describe_trial(trial: optuna.Trial, record: Record, baseline: Measurement, artifacts: Path) -> None:
    """Write the trial's note, and its measurement as an artifact in the directory `artifacts`."""
    _save_note(trial, trial_note(record, baseline))
    if record.measurement is None:
        return
    artifacts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, f"measurement-trial-{record.number}.json")
        values = {"plan": record.plan.to_dict() if record.plan else None, **record.measurement.to_dict()}
        path.write_text(json.dumps(values, indent=1))
        upload_artifact(
            artifact_store=FileSystemArtifactStore(str(artifacts)),
            file_path=str(path),
            study_or_trial=trial,
            mimetype="application/json",
        )


def _save_note(of: optuna.Trial | optuna.Study, body: str) -> None:
    from optuna_dashboard import save_note  # two seconds of importing, which the first trial's end can wait for

    save_note(of, body)


def trial_note(record: Record, baseline: Measurement) -> str:
    """Return the note of a trial: how and why it ended, its plan, its results next to the baseline's, and its times."""
    lines = [f"**{_verdict(record)}**"]
    if record.reason or record.by_definition:
        lines += ["", record.reason or record.by_definition]
    if record.plan is not None:
        lines += ["", "| plan | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in record.plan.to_dict().items()]
    if record.measurement is not None and record.score is not None:
        measured, score = record.measurement, record.score
        lines += [
            "",
            "| measured | this trial | baseline |",
            "|---|---|---|",
            *_metrics(measured, baseline),
            "",
            f"{_score_beside(record)}PerfNorm {score.perf_norm:.3f} ± {score.perf_norm_se:.3f}, SpeedNorm "
            f"{score.speed_norm:.3f} ± {score.speed_norm_se:.3f}",
        ]
        flagged = [] if record.length_flag is None else [f"**{record.length_flag}**"]
        lines += [f"- {note}" for note in (*flagged, *measured.notes)]
    elif record.predicted_speed_norm is not None:
        lines += ["", f"SpeedNorm predicted from weight bytes: {record.predicted_speed_norm:.3f}"]
    took = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in record.seconds.items() if seconds >= 0.05)
    if took:
        lines += ["", f"Took: {took}"]
    return "\n".join(lines)


def _metrics(measured: Measurement, baseline: Measurement) -> list[str]:
    """Return a row for each metric of the note that is known; what is timed in turn has its own baseline."""
    rows = []
    for name, row in shown(METRICS, "note").items():
        if getattr(measured, name) is None:
            continue
        metric, in_turn = METRICS[name], getattr(measured, f"base_{name}", None)
        base = metric.base_text
        if metric.timed and not measured.timed:
            rows.append(f"| {row.title} | {measured.time_ratio:.3f} of the baseline's, predicted | not timed |")
            continue
        if in_turn is not None:
            base = f"{metric.with_unit(row.text(in_turn))}, in turn"
        elif base is None:
            base = metric.with_unit(row.text_of(baseline, name))
        rows.append(f"| {row.title} | {metric.with_unit(row.text_of(measured, name))} | {base} |")
    return rows


def _verdict(record: Record) -> str:
    if record.stopped:
        return f"stopped at {record.stage}"
    if record.failure:
        return f"failed at {record.stage}: {record.failure}"
    if record.score is not None:
        return record.result or f"Score {record.score.score:.4f} ± {record.score.score_se:.4f}"
    return f"pruned at {record.stage}"


def _score_beside(record: Record) -> str:
    """Return the Score where the goal is another quantity, and the first line says that."""
    if record.score is None or record.goal.is_score:
        return ""
    return f"Score {record.score.score:.4f} ± {record.score.score_se:.4f}, "


def describe_study(study: optuna.Study, baseline: Measurement, baseline_score: float) -> None:
    """Write the study's note: the baseline and the best feasible trial."""
    floor = baseline_text.noise_floor(baseline)
    lines = [
        "### Baseline",
        f"{baseline_text.numbers(baseline, decimals=3)}, {baseline.total_parameters:,} parameters, "
        f"on {baseline.tokens} tokens",
        "",
        f"{baseline.backend} ({baseline.engine_version}) on {baseline.device}. Its Score is {baseline_score:g} by "
        "definition.",
        *([] if floor is None else ["", f"{floor}."]),
        "",
        "### Best feasible trial",
    ]
    goal = best.goal_of(study)
    if not goal.is_default:
        lines[-1:] = [f"### Goal: {goal}", "", *lines[-1:]]
    measured = study.get_trials(deepcopy=False)
    leader = best.best_of(measured)
    if leader is None:
        closest = best.closest_of(measured)
        lines.append("none yet" if closest is None else f"none; the closest is {_told(goal, closest)}")
    else:
        attrs = leader.user_attrs
        lines.append(
            f"trial {leader.number}: **{_value(goal, leader)}**, "
            f"PerfNorm {attrs['perf_norm']:.3f}{_pm(attrs, 'perf_norm_se', 3)}, "
            f"SpeedNorm {attrs['speed_norm']:.3f}{_pm(attrs, 'speed_norm_se', 3)}"
        )
        lines += ["", "| plan | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in attrs["plan"].items()]
        if attrs.get("length_flag"):
            lines += ["", f"**{attrs['length_flag']}**"]
    lines += _confirmed(study)
    body = "\n".join(lines)
    if study.user_attrs.get("note") != body:  # saving a note is a transaction: only when it has changed
        _save_note(study, body)
        study.set_user_attr("note", body)


def _confirmed(study: optuna.Study) -> list[str]:
    """Return the table of the confirmed trials, where there are any."""
    rows = status.confirmed_of(study)
    if not rows:
        return []
    lines = ["", "### Confirmed", "", "| trial | Score | verdict | speed |", "|---|---|---|---|"]
    for row in rows:
        score = "–" if row.score is None else f"{row.score:.4f} ± {row.score_se:.4f}"
        why = row.bounds_says or row.says or f"{row.failure}: {row.reason}"
        lines.append(f"| {row.trial} | {score} | {why.replace('|', ' ')} | {row.speed_says or 'not timed'} |")
    return lines


def _value(goal: Goal, trial: FrozenTrial) -> str:
    if goal.is_default:
        return f"Score {trial.value:.4f}{_pm(trial.user_attrs, 'score_se', 4)}"
    return goal_text.of_known(goal, best.known_of(goal, trial))


def _told(goal: Goal, trial: FrozenTrial) -> str:
    return f"trial {trial.number}: {_value(goal, trial)}"


def _pm(attributes: Mapping[str, Any], name: str, decimals: int) -> str:
    """Return a standard error behind its ±; empty where an older version did not store it."""
    return "" if attributes.get(name) is None else f" ± {attributes[name]:.{decimals}f}"


def serve(storage: optuna.storages.BaseStorage, artifacts: Path, host: str, port: int) -> None:
    """Serve optuna-dashboard until interrupted. It has no login: use a loopback address as `host`."""
    from optuna_dashboard import run_server

    artifacts.mkdir(parents=True, exist_ok=True)
    plain = storage.plain if isinstance(storage, SteadyStorage) else storage
    run_server(plain, host=host, port=port, artifact_store=FileSystemArtifactStore(str(artifacts)))
