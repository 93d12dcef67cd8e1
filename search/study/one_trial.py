"""Run one trial on a worker's bench."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import TrialState

from evaluator.measurement import Measurement
from search import processes
from search.setup.setting import Setting
from search.stages.bench import Bench
from search.stages.forecast import Forecast
from search.study import rungs, samplers, space, trials
from search.study.exclusive import Held
from search.study.heartbeat import beating
from search.study.objective import Objective, TrialFailed
from search.study.record import Record
from search.study.taught import taught

Event = dict[str, Any]
Watch = Callable[[Event], None]  # told what happens, for the progress line


class TakenOver(Exception):
    """Another run has failed this trial, because this process had not been heard of for long; it is tried again."""


def run_one(
    study: optuna.Study, bench: Bench, baseline: Measurement, worker: int, watch: Watch, stop: processes.Stop
) -> bool:
    """Run the next trial; return whether one was left to run.

    Args:
        study: The study.
        bench: The worker's bench.
        baseline: The base model's measurement.
        worker: The worker's number.
        watch: Told what happens.
        stop: Whether the user wants it to stop.

    Raises:
        KeyboardInterrupt: It was stopped; the trial is recorded and queued again.
        StudyStopped: The study's database can't be used; the trial is tried again.
    """
    current: Event = {}  # the number of the trial, as soon as it has one
    forecast = taught(Forecast.known(bench.setting), study.get_trials(deepcopy=False))

    def say(text: str) -> None:
        stop.check()
        watch({"event": "say", "text": text, **current})

    def on_stage(record: Record) -> None:
        current["trial"] = record.number
        stop.check()
        watch({"event": "stage", "worker": worker, "trial": record.number, "stage": record.stage})

    ended: list[Record] = []

    def on_end(record: Record) -> None:
        ended.append(record)
        watch(_ended(record, worker))

    objective = Objective(
        bench,
        baseline,
        say,
        on_stage=on_stage,
        on_end=on_end,
        interruptible=stop.released,
        forecast=forecast,
    )
    try:
        with stop.held():
            trial = take(study, bench.setting, worker, forecast)
            if trial is not None:
                run_taken(study, trial, objective)
                if ended and ended[-1].again:
                    trials.requeue(study)
        stop.check()
    except TakenOver:
        assert trial is not None
        watch({"event": "warn", "text": f"trial {trial.number}: its worker was silent for long; it is tried again"})
        stop.check()
    except KeyboardInterrupt:
        trials.requeue(study)
        raise
    return trial is not None


def take(study: optuna.Study, setting: Setting, worker: int, forecast: Forecast) -> optuna.Trial | None:
    """Take the next trial, or None where all of the study's trials are finished or in hand.

    The trials are counted and the next is begun under a lock, so that several runs together finish exactly N, and no
    two of them propose the same plan: a sampler knows what the others have in hand. Sampler and pruner are not in the
    storage, so they are made for each trial.
    """
    file, storage = setting.file, trials.storage_of(study)

    def begin(held: Held) -> tuple[optuna.Trial | None, bool]:
        everything = study.get_trials(deepcopy=False)
        taken = len(trials.finished(everything)) + sum(trial.state == TrialState.RUNNING for trial in everything)
        if taken >= file.trials:
            return None, True
        study.sampler = samplers.sampler(file.sampler, file.seed, worker, taken, forecast)
        shards = len(setting.texts.shards)
        study.pruner = rungs.ShardsAlone(samplers.pruner(file.pruner, shards), shards)
        trial = study.ask()
        trial.set_user_attr("worker", processes.identify_worker())
        with contextlib.suppress(Exception):  # the trial asks for its plan again, and tells what fails
            plan = space.suggest(trial, file.space, setting.model.identity)
            trial.set_user_attr("plan", plan.to_dict())
        return trial, held.kept()

    while True:
        trial, kept = storage.exclusively(begin)
        if trial is None or kept:
            return trial
        study.tell(trial, state=TrialState.FAIL)  # the server restarted, and another process may have counted too
        trials.requeue(study)


def run_taken(study: optuna.Study, trial: optuna.Trial, objective: Callable[[optuna.Trial], float]) -> None:
    """Run a trial and record how it ended.

    `study.optimize` does the same, and turns a database that can't record the end into an AssertionError.

    Raises:
        TakenOver: Another run has ended it.
    """
    value: float | None = None
    state: TrialState | None = TrialState.FAIL
    error: BaseException | None = None
    try:
        with beating(trial.storage, trial._trial_id):
            value, state = objective(trial), None
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except TrialFailed:
        pass
    except optuna.exceptions.UpdateFinishedTrialError:
        raise TakenOver from None
    except BaseException as other:
        error = other

    def end(held: Held) -> None:
        if trial.storage.get_trial(trial._trial_id).state != TrialState.RUNNING:
            raise TakenOver
        study.tell(trial, value, state)

    trials.storage_of(study).exclusively(end)
    if error is not None:
        raise error


def _ended(record: Record, worker: int) -> Event:
    return {
        "event": "end",
        "worker": worker,
        "trial": record.number,
        "stage": record.stage,
        "reason": record.reason or record.by_definition,
        "failure": record.failure,
        "stopped": record.stopped,
        "by_definition": bool(record.by_definition),
        "score": record.score.score if record.score else None,
        "score_se": record.score.score_se if record.score else None,
        "result": "" if record.goal.is_default else record.result,
        "speed_norm_se": record.score.speed_norm_se if record.score else None,
        "plan": record.plan.to_dict() if record.plan else None,
        "warnings": _warnings(record),
        "seconds": round(sum(record.seconds.values()), 1),
    }


def _warnings(record: Record) -> list[str]:
    """Return what spoils the timing of a trial that was measured now, and what is wrong with its answers' lengths."""
    measured = record.measurement
    fresh = measured is not None and not record.reused and not record.by_definition
    spoilt = list(measured.gpu.warnings) if fresh and measured is not None and measured.gpu is not None else []
    return spoilt if record.length_flag is None else [*spoilt, record.length_flag]
