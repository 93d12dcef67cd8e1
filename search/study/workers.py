"""Run a study until it holds N finished trials.

The process that was started hands out the trials, so that exactly N are finished whatever the number of workers.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from evaluator import hardware
from evaluator.measurement import Measurement
from evaluator.score import score_of
from search import processes
from search.config.study_file import StudyFile
from search.errors import StudyStopped, UsageError
from search.setup import keys, load
from search.setup.goal import Goal
from search.setup.setting import Setting, prepare
from search.show import baseline_text, goal_text
from search.stages import build
from search.stages.bench import Bench
from search.stages.forecast import Forecast
from search.stages.step_times import StepTimes
from search.study import best, dashboard, ending, header, mlflow_runs, outlook, space, storage, time_left, trials
from search.study.one_trial import Event, Watch
from search.study.steady import Patience
from search.study.team import InProcess, Processes, Team

AGAIN_S = 2.0  # between two looks at what another run does
BUILT = ("build", "measure")  # the stages in which a pruned trial has a checkpoint


@dataclasses.dataclass(frozen=True)
class _Running:
    """A study that is being run."""

    study: optuna.Study
    setting: Setting
    baseline: Measurement
    watch: Watch
    stop: processes.Stop
    tracker: mlflow_runs.Tracker
    began: float  # by time.monotonic

    def describe(self) -> None:
        dashboard.describe_study(self.study, self.baseline, self.setting.file.score.weight_perf)


def run_study(
    file: StudyFile,
    workers: int = 1,
    watch: Watch = lambda event: None,
    stop: processes.Stop | None = None,
    dashboard_command: str = "optuna-search dashboard",
    then: Callable[[Setting, optuna.Study], object] | None = None,
) -> optuna.Study:
    """Create the study or resume it until it holds `file.trials` finished trials.

    Args:
        file: The study file.
        workers: The number of trials that run at once.
        watch: Told what happens.
        stop: Whether the user wants it to stop.
        dashboard_command: The command that shows the study, for the lines with which the run begins.
        then: Called when the study has ended by itself and its engines are closed, before MLflow has the result.

    Raises:
        UsageError: Wrong usage or input, before anything is written.
        StudyStopped: The study can't continue; nothing is lost.
        KeyboardInterrupt: It was stopped; the running trial is recorded and queued again.
    """
    stop = stop or processes.Stop()
    began = time.monotonic()

    def say(text: str) -> None:
        stop.check()
        watch({"event": "say", "text": text})

    watch = _once(watch, file.storage_patience)

    def warn(text: str) -> None:
        watch({"event": "warn", "text": text})

    patience = Patience(file.storage_patience, lambda text: watch({"event": "away", "text": text}))
    setting = shared(prepare(file, say, warn=warn), workers)
    finished = 0
    existing = storage.open_storage(file.storage, patience) if storage.exists(file.storage) else None
    if existing is not None:  # a mismatch is told before the baseline is measured
        known = storage.find(existing, file.study_name, keys.definition(setting))
        finished = 0 if known is None else len(trials.finished(known.get_trials(deepcopy=False)))
    watch({"event": "header", "lines": header.lines(setting, finished, dashboard_command)})
    _warn_of_noise(load.others(setting.machine.device) if file.evaluation.is_timed else None, watch)
    build.remove_unfinished(setting.outputs / "checkpoints")
    with Bench.of(setting) as bench:
        forecast = wants_forecast(setting)
        baseline = bench.begin(say, forecast=forecast)
        if forecast and not finished:
            own_score = score_of(baseline, baseline, setting.formula).score
            view = outlook.view(Forecast.known(setting), own_score, StepTimes(), with_front=False)
            watch({"event": "forecast", "view": view})
        _warn_of_noise(baseline_text.noisy(baseline.time_ratio_se, "the base model against itself"), watch)
        for text in baseline_text.of_gpu(baseline, "the base model"):
            _warn_of_noise(text, watch)
        database = existing or storage.open_storage(file.storage, patience)
        study = database.exclusively(lambda held: _open(database, setting, baseline))
        tracker = mlflow_runs.Tracker(
            file.tracking,
            study,
            baseline,
            file.score.weight_perf,
            warn=warn,
        )
        running = _Running(study, setting, baseline, watch, stop, tracker, began)
        running.describe()
        try:
            if workers > 1:
                bench.close()
            team: Team = (
                InProcess(study, bench, baseline, watch, stop) if workers == 1 else Processes(setting, workers, watch)
            )
            with team:
                _until_finished(running, team)
            if then is not None:
                bench.close()
                then(setting, study)
        finally:
            tracker.close(files=sys.exception() is None)
    return study


def wants_forecast(setting: Setting) -> bool:
    """Return whether `run` makes the forecast's tables before the first trial."""
    wanted = setting.file.evaluation.forecast
    return setting.file.sampler.name == "forecast" if wanted == "auto" else wanted


def _warn_of_noise(text: str | None, watch: Watch) -> None:
    if text is not None:
        watch({"event": "warn", "text": text})


def _once(watch: Watch, seconds: float) -> Watch:
    """Return a `watch` that passes only one event a time in which the database is away: each process tells it."""
    last = -math.inf

    def passed(event: Event) -> None:
        nonlocal last
        if event["event"] != "away":
            return watch(event)
        before, last = last, time.monotonic()
        if last - before > seconds:
            watch({"event": "warn", "text": event["text"]})

    return passed


def _open(database: Any, setting: Setting, baseline: Measurement) -> optuna.Study:
    """Create or load the study, and store what later commands need of it."""
    file = setting.file
    study = storage.create_or_resume(database, file.study_name, keys.definition(setting), setting.goal.metric)
    study.set_user_attr("file", file.stored())
    if mlflow_runs.ID not in study.user_attrs:
        began = any(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
        study.set_user_attr(mlflow_runs.ID, "" if began else uuid.uuid4().hex)  # an older study's run is named alone
    if study.user_attrs.get("baseline") != baseline.to_dict():
        study.set_user_attr("baseline", baseline.to_dict())
    _enqueue_uncut(study, setting, Forecast.known(setting))
    return study


def _until_finished(running: _Running, team: Team) -> None:
    study, file, watch = running.study, running.setting.file, running.watch
    busy, at_start = 0, -1
    began = datetime.datetime.now()
    why_early: str | None = None
    for number in trials.retry_dead(study):
        watch({"event": "warn", "text": f"trial {number} was killed: it is tried again"})
    while True:
        running.stop.check()
        everything = study.get_trials(deepcopy=False)
        done = trials.finished(everything)
        left = time_left.estimate(done, file.trials, team.size, _limit_s(running))
        known = {
            "left": None if left is None else left.to_dict(),
            **_best(study, running.setting.goal),
            **_counts(done),
        }
        watch({"event": "done", "finished": len(done), "trials": file.trials, **known})
        at_start = len(done) if at_start < 0 else at_start
        if len(done) < file.trials:
            _stop_if_hopeless(done[at_start:], file)
            _stop_if_machine_fails(trials.machine_failures(everything, began), file)
        elsewhere = _running_elsewhere(everything, team.pids)
        if why_early is None and len(done) < file.trials:
            why_early = _why_early(running, everything, done, began)
        if why_early is not None and busy == 0:
            text = f"{why_early}; {len(done)} of {file.trials} trials are finished"
            watch({"event": "early", "text": text})
            return
        while why_early is None and team.idle and len(done) + busy + elsewhere < file.trials:
            team.go()
            busy += 1
        if busy == 0 and not elsewhere:
            return
        if busy == 0:
            watch(
                {"event": "say", "text": f"waiting for another run, which has {elsewhere} of the last trials in hand"}
            )
        had_one = busy > 0 and team.wait()
        busy = max(0, busy - 1)
        if not had_one:
            time.sleep(AGAIN_S)  # another `run` is at the last trials; should it die, they are taken over
        trials.retry_dead(study)
        if had_one:
            running.describe()
            keep_best_checkpoints(study, running.setting)
            running.tracker.trial_ended(team.pids)


def _why_early(
    running: _Running, everything: list[FrozenTrial], done: list[FrozenTrial], began: datetime.datetime
) -> str | None:
    """Say why no further trial is begun; None where one is."""
    limits = running.setting.file.limits
    return (
        ending.out_of_time(done, _limit_s(running))
        or ending.out_of_patience(done, limits.patience, running.setting.goal)
        or ending.nothing_left(everything, began)
    )


def _limit_s(running: _Running) -> float:
    """Return the seconds that limits.time leaves; inf without a limit."""
    limit = running.setting.file.limits.time
    return math.inf if limit is None else max(limit - (time.monotonic() - running.began), 0.0)


def _running_elsewhere(everything: list[FrozenTrial], pids: set[int]) -> int:
    """Count the trials that the workers of another `run` have in hand."""
    workers = [trial.user_attrs.get("worker") for trial in everything if trial.state == TrialState.RUNNING]
    return sum(worker is None or worker["pid"] not in pids or not processes.visible(worker) for worker in workers)


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
    threads = max(1, hardware.physical_cores() // workers) if device == "cpu" else None
    return dataclasses.replace(setting, machine=dataclasses.replace(setting.machine, threads=threads))


def as_studied(setting: Setting, study: optuna.Study) -> Setting:
    """Return the setting with the threads that the engines of the study's own workers had: its numbers rest on them."""
    threads = study.user_attrs.get("definition", {}).get("evaluation", {}).get("threads")
    return dataclasses.replace(setting, machine=dataclasses.replace(setting.machine, threads=threads))


def keep_best_checkpoints(study: optuna.Study, setting: Setting) -> None:
    """Delete this study's checkpoints except those of its best trials; `export` builds any of them again, bit for bit.

    Those of trials that failed or were pruned after they were built go too.
    """
    everything = study.get_trials(deepcopy=False)
    complete = [trial for trial in best.by_nearness(everything) if not trials.is_base_model(trial)]
    kept_trials = complete[: setting.file.limits.keep_checkpoints]
    running = [trial for trial in everything if trial.state == TrialState.RUNNING]
    kept = {trial.user_attrs.get("checkpoint") for trial in (*kept_trials, *running)}
    pruned = [each for each in everything if each.state == TrialState.PRUNED and each.user_attrs.get("stage") in BUILT]
    failed = [trial for trial in everything if trial.state == TrialState.FAIL]
    for trial in (*complete, *pruned, *failed):
        name = trial.user_attrs.get("checkpoint")
        if name is not None and name not in kept:
            shutil.rmtree(setting.outputs / "checkpoints" / name, ignore_errors=True)


def _best(study: optuna.Study, goal: Goal) -> Event:
    leader = best.best_trial(study)
    if leader is None:
        return {}
    result = "" if goal.is_default else goal_text.of_known(goal, best.known_of(goal, leader))
    return {
        "best": best.score_of(leader),
        "best_se": leader.user_attrs.get("score_se"),
        "best_trial": leader.number,
        "best_result": result,
    }


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


def _stop_if_machine_fails(last: list[FrozenTrial], file: StudyFile) -> None:
    if len(last) >= file.limits.max_consecutive_failures:
        raise StudyStopped(
            f"study {file.study_name!r}: this machine failed {len(last)} trials in a row, lately with: "
            f"{last[-1].user_attrs.get('reason')}. No plan is used up and nothing is lost: mend the cause and run it "
            "again"
        )


def _enqueue_uncut(study: optuna.Study, setting: Setting, forecast: Forecast) -> None:
    """Queue trials that cut nothing, one per precision, where the space holds them: the base model's own first.

    These are what people try by hand, and what is worse than the best of them is pruned from then on. Where a forecast
    is there, the most promising of the others comes next: then those that can't reach it end unbuilt.
    """
    if any(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False)):
        return
    file, own = setting.file, setting.model.identity
    uncut = space.uncut(file.space, own)

    def place(params: Mapping[str, int | str]) -> tuple[bool, float]:
        plan = space.plan_of(params, file.space, own)
        return plan != own, -setting.goal.value(forecast.known_of(plan))

    if forecast.complete:
        uncut.sort(key=place)
    for params in uncut:
        study.enqueue_trial(params, skip_if_exists=True)  # a run may have been killed between two of them
