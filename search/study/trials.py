"""Decides which trials count as finished and which are tried again."""

from __future__ import annotations

import datetime
import itertools

import optuna
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from search import stages
from search.processes import alive
from search.study.exclusive import Held
from search.study.steady import SteadyStorage

GRACE_S = 60
MAX_RETRIES = 5
MACHINE_RETRIES = 2  # of a plan for which memory or the GPU failed: perhaps it is the plan that needs too much
HISTORY = "retry_history"  # Optuna's system attribute: the numbers of the trials that a trial repeats
CONSTRAINTS = "constraints"  # Optuna's system attributes, `constraints:NAME`; a trial that is repeated finds its own
INTERRUPTED = "Interrupted"  # the kind of failure that is tried again
AGAIN = "again"  # the attribute of a trial whose plan is queued again since the machine failed, or perhaps did:
MACHINE = "machine"  # its value where the plan is surely not to blame


def finished(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that ended by themselves: measured, pruned, or failed with a reason.

    A trial that was killed or interrupted, or for which the machine failed, is FAIL too. It does not count, because it
    is tried again.
    """
    return [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or _failed(trial)]


def is_base_model(trial: FrozenTrial) -> bool:
    """Return whether the trial is the base model itself, whose Score follows from the definition."""
    return trial.user_attrs.get("stage") == stages.BASE and trial.state == TrialState.COMPLETE


def _failed(trial: FrozenTrial) -> bool:
    if trial.state != TrialState.FAIL or trial.user_attrs.get("failure") == INTERRUPTED or AGAIN in trial.user_attrs:
        return False
    return "failure" in trial.user_attrs or _given_up(trial)


def _given_up(trial: FrozenTrial) -> bool:
    """Return whether the trial has used all retries: its plan would kill one worker after the other."""
    return len(RetryHeartbeatStaleTrialCallback.retry_history(trial)) >= MAX_RETRIES


def requeue(study: optuna.Study) -> None:
    """Queue the parameters of every trial that ended without a result and is not queued again yet.

    A killed trial is queued again up to MAX_RETRIES times; one that a person stopped, or for which the machine failed,
    does not count. A trial that ended before it had a plan needs no retry: the next one draws what it would have drawn.
    """
    if not _to_retry(study.get_trials(deepcopy=False)):
        return

    def add(held: Held) -> None:
        for trial in _to_retry(study.get_trials(deepcopy=True)):
            if trial.user_attrs.get("failure") == INTERRUPTED or trial.user_attrs.get(AGAIN) == MACHINE:
                trial.system_attrs = {name: value for name, value in trial.system_attrs.items() if name != HISTORY}
            attributes = trial.system_attrs.items()
            trial.system_attrs = {name: value for name, value in attributes if name.partition(":")[0] != CONSTRAINTS}
            trial.user_attrs = {}
            RetryHeartbeatStaleTrialCallback()(study, trial)

    storage_of(study).exclusively(add)


def _to_retry(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    retried = {number for trial in trials for number in trial.system_attrs.get(HISTORY, [])}
    return [
        trial
        for trial in trials
        if trial.state == TrialState.FAIL and not _failed(trial) and trial.number not in retried and _has_plan(trial)
    ]


def _has_plan(trial: FrozenTrial) -> bool:
    return "plan" in trial.user_attrs or "fixed_params" in trial.system_attrs or HISTORY in trial.system_attrs


def may_be_tried_again(trial: FrozenTrial) -> bool:
    """Return whether the plan of a trial for which perhaps the machine failed has retries left."""
    return len(RetryHeartbeatStaleTrialCallback.retry_history(trial)) < MACHINE_RETRIES


def machine_failures(trials: list[FrozenTrial], since: datetime.datetime) -> list[FrozenTrial]:
    """Return the last trials that ended since a time, as far back as the machine failed for all of them."""
    ended = [trial for trial in trials if trial.datetime_complete is not None and trial.datetime_complete >= since]
    ended.sort(key=lambda trial: (trial.datetime_complete, trial.number))
    in_a_row = itertools.takewhile(lambda trial: AGAIN in trial.user_attrs, reversed(ended))
    return list(in_a_row)[::-1]


def retry_dead(study: optuna.Study) -> list[int]:
    """Fail the RUNNING trials whose worker is dead, queue each again, and return their numbers.

    A worker whose pid means the same here is looked up by it. Of others, and of one that is stopped, Optuna's heartbeat
    tells (https://optuna.readthedocs.io, RDBStorage). A trial that names no worker is dead after GRACE_S seconds.
    """
    dead = []
    storage = storage_of(study)
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    silent = set(storage._get_stale_trial_ids(study._study_id)) if running else set()
    for trial in running:
        if trial._trial_id in silent or _is_gone(trial):

            def fail(held: Held, trial: FrozenTrial = trial) -> None:
                if _given_up(trial):
                    _explain_death(study, trial)
                study.tell(trial.number, state=TrialState.FAIL)

            try:
                storage.exclusively(fail)
            except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                continue  # another worker was faster, or it ended meanwhile
            dead.append(trial.number)
    requeue(study)
    return dead


def _is_gone(trial: FrozenTrial) -> bool:
    worker = trial.user_attrs.get("worker")
    if worker is not None:
        return alive(worker) is False
    started = trial.datetime_start
    return started is None or datetime.datetime.now() - started > datetime.timedelta(seconds=GRACE_S)


def storage_of(study: optuna.Study) -> SteadyStorage:
    """Return the database of a study that `search.study.storage` has opened."""
    storage = study._storage
    assert isinstance(storage, SteadyStorage)
    return storage


def _explain_death(study: optuna.Study, trial: FrozenTrial) -> None:
    reason = f"its worker was killed {MAX_RETRIES + 1} times, perhaps by the kernel for lack of memory; not tried again"
    for name, value in {"failure": "Killed", "reason": reason}.items():
        study._storage.set_trial_user_attr(trial._trial_id, name, value)
