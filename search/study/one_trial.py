"""Run one trial on a worker's bench."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna

from evaluator.measurement import Measurement
from search import processes
from search.stages.bench import Bench
from search.stages.forecast import Forecast
from search.study import samplers, trials
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
    forecast = Forecast.known(bench.setting)
    study.sampler = samplers.sampler(file.sampler, file.seed, worker, done, forecast)
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
        forecast=forecast,
    )
    try:
        with stop.held():
            study.optimize(objective, n_trials=1, catch=(TrialFailed,))
        stop.check()
    except KeyboardInterrupt:
        _queue_interrupted(study)
        raise


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
