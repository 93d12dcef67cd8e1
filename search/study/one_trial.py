"""Run one trial on a worker's bench."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna

from evaluator.measurement import Measurement
from search import processes
from search.failures import Fault
from search.stages.bench import Bench
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
    study.sampler = samplers.sampler(file.sampler, file.seed, worker, done)
    study.pruner = samplers.pruner(file.pruner, len(bench.setting.texts.shards))

    current: Event = {}  # the number of the trial, as soon as it has one

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
    )
    try:
        with stop.held():
            study.optimize(objective, n_trials=1, catch=(TrialFailed,))
            if ended and ended[-1].again:
                counts = ended[-1].fault is not Fault.MACHINE
                trials.retry_after_machine(study, ended[-1].number, counts=counts)
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
        "reason": record.reason or record.by_definition,
        "failure": record.failure,
        "stopped": record.stopped,
        "by_definition": bool(record.by_definition),
        "score": record.score.score if record.score else None,
        "score_se": record.score.score_se if record.score else None,
        "speed_norm_se": record.score.speed_norm_se if record.score else None,
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
