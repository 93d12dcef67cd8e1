"""By hand: measures the baseline, evaluates a checkpoint, and compresses and evaluates several models in turn.

Everything runs on the bench of a study's trials. A job can be resumed: what was built and measured under the same
circumstances is not built or measured again.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.errors import CompressionError
from compressors.plan import CompressionPlan, name_of
from evaluator.errors import EvaluationError
from evaluator.measurement import Measurement
from evaluator.score import score_of
from search.by_hand import compress
from search.by_hand.analyze import analysis_of
from search.by_hand.evaluate import candidate_in, evaluate_candidate, known_evaluation, stale_baseline
from search.by_hand.evaluation import Evaluation
from search.config.study_file import StudyFile
from search.errors import SearchError, UsageError
from search.failures import FAILURES, why
from search.files import CACHE
from search.say import Say, silent
from search.setup import collect, keys, load, sources
from search.setup.setting import Setting, prepare
from search.show import baseline_text
from search.show.analysis import Analysis
from search.show.rows import Row
from search.stages import measurements
from search.stages.bench import Bench
from search.study import mlflow_runs

NAMED = ("compression.", "experiments=", "experiment_name=")  # overrides that a plan's name already tells

Warn = Callable[[str], None]


# -- one at a time -------------------------------------------------------------------------------------------


def baseline(bench: Bench, say: Say, warn: Warn, *, again: bool = False) -> Measurement:
    """Return the base model's measurement.

    Writes outputs/baseline_result.json, and to MLflow a run tagged `baseline` when the measurement is new.

    Args:
        bench: The bench to measure on.
        say: Is called with the current step.
        warn: Is called with a warning.
        again: Whether to measure it although its measurement is known.
    """
    setting, began = bench.setting, time.time()
    fresh = again or measurements.known(keys.baseline_path(setting), setting) is None
    if fresh:
        differs = stale_baseline(setting)
        if differs:
            warn(f"the baseline is measured again: {differs}")
        _warn_of_load(setting, warn)
    measured = bench.baseline(say, again=again)
    if fresh:
        _warn_if(baseline_text.noisy(measured.time_ratio_se, "the base model against itself"), warn)
        for text in baseline_text.of_gpu(measured, "the base model"):
            warn(text)
        score = score_of(measured, measured, setting.formula)
        values = {**mlflow_runs.measured(measured), **setting.model.identity.to_dict(), "score": score.score}
        tags = {"baseline": "true", "model": setting.file.source_shown}
        mlflow_runs.log_by_hand(
            setting.file.tracking, "baseline", {**values, "perf_norm": 1.0, "speed_norm": 0.0}, tags, began, warn
        )
    return measured


def evaluate(bench: Bench, path: Path, name: str, say: Say, warn: Warn, words: Sequence[str] = ()) -> Evaluation:
    """Measure the checkpoint in `path` against the baseline; write its eval_result.json and an MLflow run.

    Args:
        bench: The bench to measure on.
        path: The checkpoint's directory.
        name: The name of the evaluation and of the run.
        say: Is called with the current step.
        warn: Is called with a warning when MLflow can't be reached.
        words: The words of the command line that chose the study file.
    """
    candidate = candidate_in(path, bench.setting)
    if keys.baseline_path(bench.setting).is_file():  # else the baseline, which comes first, warns
        _warn_of_load(bench.setting, warn)
    measured = baseline(bench, say, warn)
    began = time.time()
    evaluation = evaluate_candidate(bench, candidate, measured, name, say, words, warn)
    score = evaluation.score
    _warn_if(baseline_text.noisy(score.speed_norm_se, name), warn)
    for text in baseline_text.of_gpu(evaluation.measurement, name):
        warn(text)
    _warn_if(evaluation.length_warning, lambda text: warn(f"{name}: {text}"))
    values = {
        **({} if evaluation.plan is None else evaluation.plan.to_dict()),
        **mlflow_runs.measured(evaluation.measurement),
        **{"perf_norm": score.perf_norm, "speed_norm": score.speed_norm, "score": score.score},
    }
    tags = {"model": str(path), "base": bench.setting.file.source_shown}
    if evaluation.description:
        tags["description"] = evaluation.description
    mlflow_runs.log_by_hand(bench.setting.file.tracking, name, values, tags, began, warn)
    return evaluation


def _warn_of_load(setting: Setting, warn: Warn) -> None:
    if setting.file.evaluation.is_timed:
        _warn_if(load.others(setting.machine.device), warn)


def _warn_if(text: str | None, warn: Warn) -> None:
    if text is not None:
        warn(text)


def analyze(file: StudyFile, say: Say, *, importance: bool) -> Analysis:
    """Return the structure of the study file's model, with its layers' importance where that was measured.

    A model of a family that is not known here is described too, without importance.

    Args:
        file: The study file.
        say: Is called with the current step.
        importance: Whether to measure the importance now if it isn't known.
    """
    path = sources.resolve(file.model.source, CACHE, revision=file.model.revision)
    try:
        setting = prepare(file, say, search=False, engine=False)
    except (SearchError, CompressionError, EvaluationError):
        if importance:
            raise
        return analysis_of(path)
    calibration = collect.calibrate(setting, say) if importance or collect.calibration_path(setting).is_file() else None
    return analysis_of(path, calibration, kernels=setting.kernels)


# -- several in turn -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """A job makes and measures one model.

    Attributes:
        words: The words of the command line that chose its study file.
        name: The name of its evaluation and its MLflow run, and a part of its directory's.
        path: The directory that it writes.
    """

    file: StudyFile
    words: tuple[str, ...]
    name: str
    path: Path
    plan: CompressionPlan


def plan_jobs(
    files: Sequence[tuple[StudyFile, Sequence[str]]],
    save_path: Path | None,
    say: Say,
    *,
    engine: bool = True,
    multirun: bool = False,
) -> list[Job]:
    """Return a job for each study file, checked before the first one begins.

    A job writes to `save_path`. Those of a multirun, be they one or several, write to directories model_NAME next to
    it: NAME is a job's experiment_name if no other job has the same, else the plan's name.

    Args:
        files: The study files, each with the words of the command line that chose it.
        save_path: The directory to write; None for submit/model.
        say: Is called with the current step.
        engine: Whether the models are to be evaluated too.
        multirun: Whether the study files are those of a multirun.

    Raises:
        UsageError: A study file can't be used, or two jobs would write the same directory.
        CompressionError: A model can't be read.
    """
    jobs: list[Job] = []
    settings: list[Setting] = []
    given = Counter(file.experiment_name for file, _ in files)
    swept = {word for _, words in files for word in words if any(word not in others for _, others in files)}
    for file, words in files:
        setting = _setting(file, settings, say, engine)
        plan = compress.plan_of(file.compression, setting.model.identity)
        name = name_of(plan, setting.model.identity)
        if file.experiment_name is not None and given[file.experiment_name] == 1:
            name = file.experiment_name
        path = save_path or Path("submit/model")
        if multirun:
            others = [word for word in words if word in swept and not word.startswith(NAMED)]
            name = "_".join([name, *(_slug(word) for word in others)])
            path = path.parent / f"model_{name}"
        if any(job.path == path for job in jobs):
            raise UsageError(f"multirun: two jobs would both write {path}; sweep what makes models differ")
        jobs.append(Job(file, tuple(words), name, path, plan))
    return jobs


def _slug(override: str) -> str:
    key, _, value = override.partition("=")
    return re.sub(r"[^\w.]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-")


def run_jobs(jobs: Sequence[Job], say: Say, warn: Warn, ended: Callable[[int, Row], None]) -> list[Row]:
    """Compress and evaluate each job's model; return a row for the comparison per job.

    A job that can't be built or measured has its reason in its row, and the next one begins.

    Args:
        jobs: The jobs, in the order in which they run.
        say: Is called with the current step.
        warn: Is called with a warning.
        ended: Is called with the number of a job, from 0, and its row when it has ended.
    """
    rows: list[Row] = []
    bench: Bench | None = None
    settings: list[Setting] = []
    try:
        for number, job in enumerate(jobs):
            setting = _setting(job.file, settings, say, warn=warn)
            if bench is None or bench.setting.texts.shards is not setting.texts.shards:  # not prepared together
                if bench is not None:
                    bench.close()
                bench = Bench.of(setting)
            try:
                row = _run(job, bench.with_setting(setting), say, warn)
            except FAILURES as error:
                told = why(error)
                row = Row(job.name, str(job.path), failure=told["failure"], reason=told["reason"])
            rows.append(row)
            ended(number, row)
    finally:
        if bench is not None:
            bench.close()
    return rows


def _run(job: Job, bench: Bench, say: Say, warn: Warn) -> Row:
    setting = bench.setting
    outcome = compress.foresee(job.plan, setting)
    for warning in outcome.warnings:
        warn(f"{job.name}: {warning}")
    compressed = compress.compress(outcome, setting, job.path, job.file.export.for_transformers, say)
    known = known_evaluation(job.path, setting) if compressed.reused else None
    evaluation = known or evaluate(bench, job.path, job.name, say, warn, job.words)
    return evaluation.row(job.path, before=known is not None)


def _setting(file: StudyFile, settings: list[Setting], say: Say, engine: bool = True, warn: Warn = silent) -> Setting:
    """Return a setting for `file`: one of `settings` where the files differ only in the model that they make."""

    def shared(other: StudyFile) -> Mapping[str, Any]:
        own = {"compression": True, "experiment_name": True, "description": True, "export": True}
        return other.model_dump(exclude={**own, "model": {"num_layers"}})

    for setting in settings:
        if shared(setting.file) == shared(file):
            return dataclasses.replace(setting, file=file)
    settings.append(prepare(file, say, search=False, engine=engine, warn=warn))
    return settings[-1]


def with_baseline(rows: Sequence[Row]) -> list[Row]:
    """Return the rows after the baseline's row, which comes from the first model that was evaluated."""
    for row in rows:
        evaluation = None if row.result is None else Evaluation.read(Path(row.path))
        if evaluation is not None:
            return [evaluation.baseline_row(), *rows]
    return list(rows)
