"""Run a study until it holds N finished trials.

The process that was started hands out the trials, so that exactly N are finished whatever the number of workers.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from evaluator.measurement import Measurement
from search import processes
from search.config.study_file import StudyFile
from search.errors import StudyStopped, UsageError
from search.setup import keys
from search.setup.setting import Setting, prepare
from search.stages import build
from search.stages.bench import Bench
from search.study import dashboard, mlflow_runs, space, storage, trials
from search.study.one_trial import Event, Watch
from search.study.team import InProcess, Processes, Team


@dataclasses.dataclass(frozen=True)
class _Running:
    """A study that is being run."""

    study: optuna.Study
    setting: Setting
    baseline: Measurement
    watch: Watch
    stop: processes.Stop
    tracker: mlflow_runs.Tracker

    def describe(self) -> None:
        dashboard.describe_study(self.study, self.baseline, self.setting.file.score.weight_perf)


def run_study(
    file: StudyFile, workers: int = 1, watch: Watch = lambda event: None, stop: processes.Stop | None = None
) -> optuna.Study:
    """Create the study or resume it until it holds `file.trials` finished trials.

    Raises:
        UsageError: Wrong usage or input, before anything is written.
        StudyStopped: The study can't continue; nothing is lost.
        KeyboardInterrupt: It was stopped; the running trial is recorded and queued again.
    """
    stop = stop or processes.Stop()

    def say(text: str) -> None:
        stop.check()
        watch({"event": "say", "text": text})

    setting = shared(prepare(file, say), workers)
    existing = storage.open_storage(file.storage) if storage.exists(file.storage) else None
    if existing is not None:  # a mismatch is told before the baseline is measured
        storage.find(existing, file.study_name, keys.definition(setting))
    build.remove_unfinished(setting.outputs / "checkpoints")
    with Bench.of(setting) as bench:
        baseline = bench.baseline(say)
        study = _open(existing or storage.open_storage(file.storage), setting, baseline)
        tracker = mlflow_runs.Tracker(
            file.tracking,
            study,
            baseline,
            file.score.weight_perf,
            warn=lambda text: watch({"event": "warn", "text": text}),
        )
        running = _Running(study, setting, baseline, watch, stop, tracker)
        running.describe()
        try:
            if wants_forecast(setting):
                bench.make_forecast(say, damage=setting.file.sampler.name == "forecast")
            if workers > 1:
                bench.close()
            team: Team = (
                InProcess(study, bench, baseline, watch, stop) if workers == 1 else Processes(setting, workers, watch)
            )
            with team:
                _until_finished(running, team)
        finally:
            tracker.close()
    return study


def wants_forecast(setting: Setting) -> bool:
    """Return whether `run` makes the forecast's tables before the first trial."""
    wanted = setting.file.evaluation.forecast
    return setting.file.sampler.name == "forecast" if wanted == "auto" else wanted


def _open(database: Any, setting: Setting, baseline: Measurement) -> optuna.Study:
    """Create or load the study, and store what later commands need of it."""
    file = setting.file
    study = storage.create_or_resume(database, file.study_name, keys.definition(setting))
    study.set_user_attr("file", file.model_dump(mode="json", exclude={"storage"}))  # its URL may hold a password
    if study.user_attrs.get("baseline") != baseline.to_dict():
        study.set_user_attr("baseline", baseline.to_dict())
    _enqueue_uncut(study, setting)
    return study


def _until_finished(running: _Running, team: Team) -> None:
    study, file, watch = running.study, running.setting.file, running.watch
    busy, at_start = 0, -1
    for number in trials.retry_dead(study):
        watch({"event": "warn", "text": f"trial {number} was killed: it is tried again"})
    while True:
        running.stop.check()
        everything = study.get_trials(deepcopy=False)
        done = trials.finished(everything)
        watch({"event": "done", "finished": len(done), "trials": file.trials, **_best(study), **_counts(done)})
        at_start = len(done) if at_start < 0 else at_start
        if len(done) < file.trials:
            _stop_if_hopeless(done[at_start:], file)
        elsewhere = _running_elsewhere(everything, team.pids)
        while team.idle and len(done) + busy + elsewhere < file.trials:
            team.go(len(done) + busy)
            busy += 1
        if busy == 0 and elsewhere:
            time.sleep(2)  # another `run` is at the last trials; should it die, they are taken over
            trials.retry_dead(study)
            continue
        if busy == 0:
            return
        team.wait()
        busy -= 1
        trials.retry_dead(study)
        running.describe()
        keep_best_checkpoints(study, running.setting)
        running.tracker.trial_ended()


def _running_elsewhere(everything: list[FrozenTrial], pids: set[int]) -> int:
    """Count the trials that the workers of another `run` have in hand."""
    running = [trial for trial in everything if trial.state == TrialState.RUNNING]
    return sum(trial.user_attrs.get("worker", {"pid": None})["pid"] not in pids for trial in running)


def shared(setting: Setting, workers: int) -> Setting:
    """Return the setting of one of several workers on this machine.

    Raises:
        UsageError: Their timings would disturb each other.
    """
    if workers == 1:
        return setting
    device = setting.machine.device
    if device == "cuda" and workers > torch.cuda.device_count():
        raise UsageError(
            f"--workers {workers}: there are {torch.cuda.device_count()} GPUs, and engines that share one disturb each "
            "other's timings; give each worker a GPU of its own"
        )
    threads = max(1, (os.cpu_count() or 1) // workers) if device == "cpu" else None
    return dataclasses.replace(setting, machine=dataclasses.replace(setting.machine, threads=threads))


def keep_best_checkpoints(study: optuna.Study, setting: Setting) -> None:
    """Delete this study's checkpoints except those of its best trials; `export` builds any of them again, bit for bit.

    Those of trials that failed after they were built go too.
    """
    everything = study.get_trials(deepcopy=False)
    complete = [trial for trial in everything if trial.state == TrialState.COMPLETE]
    best = sorted(complete, key=lambda trial: -(trial.value or 0.0))[: setting.file.limits.keep_checkpoints]
    running = [trial for trial in everything if trial.state == TrialState.RUNNING]
    kept = {trial.user_attrs.get("checkpoint") for trial in (*best, *running)}
    failed = [trial for trial in everything if trial.state == TrialState.FAIL]
    for trial in (*complete, *failed):
        name = trial.user_attrs.get("checkpoint")
        if name is not None and name not in kept:
            shutil.rmtree(setting.outputs / "checkpoints" / name, ignore_errors=True)


def _best(study: optuna.Study) -> Event:
    try:
        best = study.best_trial
    except ValueError:
        return {}
    return {"best": best.value, "best_trial": best.number}


def _counts(done: list[FrozenTrial]) -> Event:
    states = [trial.state.name for trial in done]
    return {"pruned": states.count("PRUNED"), "failed": states.count("FAIL")}


def _stop_if_hopeless(done: list[FrozenTrial], file: StudyFile) -> None:
    last = done[-file.limits.max_consecutive_failures :]
    if len(last) == file.limits.max_consecutive_failures and all(trial.state == TrialState.FAIL for trial in last):
        reasons = [str(trial.user_attrs.get("reason")) for trial in last]
        raise StudyStopped(
            f"study {file.study_name!r}: the last {len(last)} trials failed, lately with: "
            f"{reasons[-1]}. Nothing is lost: mend "
            "the cause and run it again, with a higher limits.max_consecutive_failures if these "
            "failures are to be expected"
        )


def _enqueue_uncut(study: optuna.Study, setting: Setting) -> None:
    """Queue trials that cut nothing, one per precision, where the space holds them: the base model's own first.

    These are what people try by hand, and what is worse than the best of them is pruned from then on.
    """
    if study.get_trials(deepcopy=False):
        return
    for params in space.uncut(setting.file.space, setting.model.identity):
        study.enqueue_trial(params)
