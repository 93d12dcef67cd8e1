"""Run one trial on a worker's bench."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import TrialState

from evaluator.measurement import Measurement
from search import processes
from search.stages.bench import Bench
from search.study import samplers, trials
from search.study.heartbeat import beating
from search.study.objective import Objective, TrialFailed
from search.study.record import Record

Event = dict[str, Any]
Watch = Callable[[Event], None]  # told what happens, for the progress line


def run_one(
    study: optuna.Study, bench: Bench, baseline: Measurement, worker: int, done: int, watch: Watch, stop: processes.Stop
) -> None:
    """Run the next trial.

    Sampler and pruner are not in the storage, so they are made for each trial.

    Args:
        study: The study.
        bench: The worker's bench.
        baseline: The base model's measurement.
        worker: The worker's number.
        done: The number of trials that are finished or in hand, from which the sampler is seeded.
        watch: Told what happens.
        stop: Whether the user wants it to stop.

    Raises:
        KeyboardInterrupt: It was stopped; the trial is recorded and queued again.
    """
    file = bench.setting.file
    study.sampler = samplers.sampler(file.sampler, file.seed, worker, done)
    study.pruner = samplers.pruner(file.pruner, len(bench.setting.texts.shards))

    def say(text: str) -> None:
        stop.check()
        watch({"event": "say", "text": text})

    def on_stage(record: Record) -> None:
        stop.check()
        watch({"event": "stage", "worker": worker, "trial": record.number, "stage": record.stage})

    objective = Objective(
        bench,
        baseline,
        say,
        on_stage=on_stage,
        on_end=lambda record: watch(_ended(record, worker)),
        interruptible=stop.released,
    )
    try:
        with stop.held():
            take_and_run(study, objective)
        stop.check()
    except KeyboardInterrupt:
        _queue_interrupted(study)
        raise


def take_and_run(study: optuna.Study, objective: Callable[[optuna.Trial], float]) -> None:
    """Take a trial, run it and record how it ended.

    `study.optimize` does the same, and turns a database that can't record the end into an AssertionError.
    """
    optuna.storages.fail_stale_trials(study)
    trial = study.ask()
    value: float | None = None
    state: TrialState | None = TrialState.FAIL
    try:
        with beating(trial.storage, trial._trial_id):
            value, state = objective(trial), None
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except TrialFailed:
        pass
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    study.tell(trial, value, state)


def _ended(record: Record, worker: int) -> Event:
    return {
        "event": "end",
        "worker": worker,
        "trial": record.number,
        "stage": record.stage,
        "reason": record.reason,
        "failure": record.failure,
        "score": record.score.score if record.score else None,
        "plan": record.plan.to_dict() if record.plan else None,
        "seconds": round(sum(record.seconds.values()), 1),
    }


def _queue_interrupted(study: optuna.Study) -> None:
    mine = processes.identify_worker()
    everything = study.get_trials(deepcopy=True)
    retried = {number for trial in everything for number in trial.system_attrs.get("retry_history", [])}
    for trial in everything:
        attrs = trial.user_attrs
        if attrs.get("failure") == trials.INTERRUPTED and attrs.get("worker") == mine and trial.number not in retried:
            trials.retry_interrupted(study, trial)
