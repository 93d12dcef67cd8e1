"""By hand: measure the baseline, compress by one plan, evaluate a checkpoint, and several of them in turn (multirun).

All on the bench that a study's trials use. Every job is resumable: what was built and measured under the same
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
from search.by_hand import analyze as analysis
from search.by_hand import compress
from search.by_hand import evaluate as evaluation
from search.config.study_file import StudyFile
from search.errors import SearchError, UsageError
from search.failures import FAILURES, why
from search.files import CACHE, read_json
from search.setup import sources
from search.setup.setting import Say, Setting, prepare
from search.stages.bench import Bench
from search.study import mlflow_runs

MADE = ("compression.", "experiments=", "experiment_name=")  # overrides that a plan's name already tells

Warn = Callable[[str], None]


# -- one at a time -------------------------------------------------------------------------------------------


def baseline(bench: Bench, warn: Warn) -> Measurement:
    """The base model's measurement; outputs/baseline_result.json, and in MLflow a run tagged `baseline` when it is
    new."""
    setting, began = bench.setting, time.time()
    fresh = bench.again or not bench.baseline_path.is_file()
    if fresh:
        why = evaluation.stale_baseline(setting)
        if why:
            warn(f"the baseline is measured again: {why}")
    measured = bench.baseline()
    if fresh:
        bench.again = False
        score = score_of(measured, measured, setting.formula)
        values = {**mlflow_runs.measured(measured), **setting.identity.to_dict(), "score": score.score}
        tags = {"baseline": "true", "model": setting.file.model.source}
        mlflow_runs.log_by_hand(
            setting.file.tracking, "baseline", {**values, "perf_norm": 1.0, "speed_norm": 0.0}, tags, began, warn
        )
    return measured


def evaluate(bench: Bench, path: Path, name: str, warn: Warn, words: Sequence[str] = ()) -> dict[str, Any]:
    """Measure `path` against the baseline: `path`/eval_result.json and an MLflow run called `name`."""
    candidate = evaluation.candidate_in(path, bench.setting)
    baseline(bench, warn)
    began = time.time()
    found = evaluation.evaluate(bench, candidate, name, words)
    values = {
        **(found["plan"] or {}),
        **mlflow_runs.measured(Measurement.from_dict(found["measurement"])),
        **{key: found[key] for key in ("perf_norm", "speed_norm", "score")},
    }
    tags = {"model": str(path), "base": bench.setting.file.model.source}
    if found["description"]:
        tags["description"] = found["description"]
    mlflow_runs.log_by_hand(bench.setting.file.tracking, name, values, tags, began, warn)
    return found


def analyze(file: StudyFile, say: Say, *, importance: bool) -> dict[str, Any]:
    """The structure of the study file's model (`search.analyze`), with its layers' importance where that was measured.

    importance: measure it now. A model of a family that is not known here is described all the same.
    """
    path = sources.resolve(file.model.source, CACHE, revision=file.model.revision)
    try:
        setting = prepare(file, say, search=False, engine=False)
    except (SearchError, CompressionError, EvaluationError):
        if importance:
            raise
        return analysis.analyze(path)
    known = importance or setting.calibration_path.is_file()
    return analysis.analyze(path, setting.calibrate(say) if known else None, kernels=setting.kernels)


# -- several in turn -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """words: of the command line that chose its study file. name: of its directory and its run."""

    file: StudyFile
    words: tuple[str, ...]
    name: str
    path: Path
    plan: CompressionPlan


def plan_jobs(
    files: Sequence[tuple[StudyFile, Sequence[str]]], save_path: Path | None, say: Say, *, engine: bool = True
) -> list[Job]:
    """A job per study file and the words that chose it, checked before any begins. Raises UsageError and its kin.

    One job writes to `save_path`; several to model_NAME beside it, where NAME is the experiment_name of a job that
    shares it with no other, and else the plan's. engine: whether they are to be evaluated too.
    """
    found: list[Job] = []
    settings: list[Setting] = []
    given = Counter(file.experiment_name for file, _ in files)
    swept = {word for _, words in files for word in words if any(word not in others for _, others in files)}
    for file, words in files:
        setting = _setting(file, settings, say, engine)
        plan = compress.plan_of(file.compression, setting.identity)
        name = name_of(plan, setting.identity)
        if file.experiment_name is not None and given[file.experiment_name] == 1:
            name = file.experiment_name
        if len(files) == 1:
            path = save_path or Path("submit/model")
        else:
            others = [word for word in words if word in swept and not word.startswith(MADE)]
            name = "_".join([name, *(_slug(word) for word in others)])
            path = (save_path or Path("submit/model")).parent / f"model_{name}"
        if any(job.path == path for job in found):
            raise UsageError(f"multirun: two jobs would both write {path}; sweep what makes models differ")
        found.append(Job(file, tuple(words), name, path, plan))
    return found


def _slug(override: str) -> str:
    key, _, value = override.partition("=")
    return re.sub(r"[^\w.]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-")


def run(
    jobs: Sequence[Job], say: Say, warn: Warn, ended: Callable[[int, dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Compress and evaluate each; a row for the comparison per job, and `ended` is told of each.

    A job that can't be built or measured has its reason in its row, and the others go on.
    """
    rows: list[dict[str, Any]] = []
    bench: Bench | None = None
    settings: list[Setting] = []
    try:
        for number, job in enumerate(jobs):
            setting = _setting(job.file, settings, say)
            if bench is None or bench.setting.shards is not setting.shards:  # not prepared together
                if bench is not None:
                    bench.close()
                bench = Bench(setting, say)
            bench.setting = setting
            try:
                done = _run(job, bench, warn)
            except FAILURES as error:
                done = {"name": job.name, "path": str(job.path), **why(error)}
            rows.append(done)
            ended(number, done)
    finally:
        if bench is not None:
            bench.close()
    return rows


def _run(job: Job, bench: Bench, warn: Warn) -> dict[str, Any]:
    setting = bench.setting
    outcome = compress.foresee(job.plan, setting)
    for warning in outcome.warnings:
        warn(f"{job.name}: {warning}")
    made = compress.compress(outcome, setting, job.path, job.file.export.for_transformers, bench.say)
    known = evaluation.known(job.path, setting) if made.reused else None
    found = known or evaluate(bench, job.path, job.name, warn, job.words)
    return {**row(found, job.path), "before": known is not None}


def _setting(file: StudyFile, settings: list[Setting], say: Say, engine: bool = True) -> Setting:
    """Prepared once for all files that differ only in what is made."""

    def shared(other: StudyFile) -> Mapping[str, Any]:
        made = {"compression": True, "experiment_name": True, "description": True, "export": True}
        return other.model_dump(exclude={**made, "model": {"num_layers"}})

    for setting in settings:
        if shared(setting.file) == shared(file):
            return dataclasses.replace(setting, file=file)
    settings.append(prepare(file, say, search=False, engine=engine))
    return settings[-1]


# -- rows ----------------------------------------------------------------------------------------------------


def row(found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """An evaluation (eval_result.json) as a row of a comparison."""
    measured, plan = found["measurement"], found["plan"]
    keys = ("perf_norm", "perf_norm_se", "speed_norm", "speed_norm_se", "score", "score_se")
    return {
        "name": found["name"],
        "path": str(path),
        "plan": plan,
        "total_parameters": measured["total_parameters"],
        "model_size_mb": measured["model_size_mb"],
        "perplexity": measured["perplexity"],
        "kl_nats_per_token": measured["kl_nats_per_token"],
        "time_per_token_ms": measured["time_per_token_ms"],
        **{key: found[key] for key in keys},
    }


def baseline_row(found: Mapping[str, Any]) -> dict[str, Any]:
    """The baseline of an evaluation, as the row to compare with."""
    measured = found["baseline"]
    formula = found["formula"]
    return {
        "name": "baseline",
        "path": found["model"]["source"],
        "plan": found["base_plan"],
        "total_parameters": measured["total_parameters"],
        "model_size_mb": measured["model_size_mb"],
        "perplexity": measured["perplexity"],
        "kl_nats_per_token": 0.0,
        "time_per_token_ms": measured["time_per_token_ms"],
        "perf_norm": 1.0,
        "perf_norm_se": 0.0,
        "speed_norm": 0.0,
        "speed_norm_se": 0.0,
        "score": formula["weight_perf"],
        "score_se": 0.0,
    }


def with_baseline(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows and that of the baseline of the first that was evaluated."""
    for done in rows:
        if "failure" not in done:
            found = read_json(Path(done["path"]) / evaluation.RESULT)
            if found is not None:
                return [baseline_row(found), *rows]
    return list(rows)
