"""Decides which trials count as finished and which are tried again."""

from __future__ import annotations

import datetime
import itertools

import optuna
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from search import stages
from search.processes import alive

GRACE_S = 60
MAX_RETRIES = 5
MACHINE_RETRIES = 2  # of a plan for which memory or the GPU failed: perhaps it is the plan that needs too much
INTERRUPTED = "Interrupted"  # the kind of failure that is tried again
AGAIN = "again"  # the attribute of a trial whose plan is queued again since the machine failed


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


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a killed trial's parameters again, up to MAX_RETRIES times, without its user attributes."""
    if not _given_up(trial):
        trial.user_attrs = {}
        RetryHeartbeatStaleTrialCallback()(study, trial)


def retry_interrupted(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue the parameters of a trial that a person stopped again, which does not count as a retry."""
    trial.system_attrs = {name: value for name, value in trial.system_attrs.items() if name != "retry_history"}
    retry(study, trial)


def may_be_tried_again(trial: FrozenTrial) -> bool:
    """Return whether the plan of a trial for which perhaps the machine failed has retries left."""
    return len(RetryHeartbeatStaleTrialCallback.retry_history(trial)) < MACHINE_RETRIES


def retry_after_machine(study: optuna.Study, number: int, *, counts: bool) -> None:
    """Queue the parameters of a trial again for which the machine failed.

    Args:
        study: The study.
        number: The number of the trial.
        counts: Whether it counts as a retry.
    """
    trial = study.get_trials(deepcopy=True)[number]
    (retry if counts else retry_interrupted)(study, trial)


def machine_failures(trials: list[FrozenTrial], since: datetime.datetime) -> list[FrozenTrial]:
    """Return the last trials that ended since a time, as far back as the machine failed for all of them."""
    ended = [trial for trial in trials if trial.datetime_complete is not None and trial.datetime_complete >= since]
    ended.sort(key=lambda trial: (trial.datetime_complete, trial.number))
    in_a_row = itertools.takewhile(lambda trial: AGAIN in trial.user_attrs, reversed(ended))
    return list(in_a_row)[::-1]


def retry_dead(study: optuna.Study) -> list[int]:
    """Fail the RUNNING trials whose worker is dead, queue each again, and return their numbers.

    A worker of this machine is looked up by its pid. A trial that names no worker is dead after GRACE_S seconds.
    Optuna's heartbeat finds the dead workers of other machines (https://optuna.readthedocs.io, RDBStorage).
    """
    dead = []
    for trial in study.get_trials(deepcopy=True, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get("worker")
        if worker is None:
            started = trial.datetime_start
            gone = started is None or datetime.datetime.now() - started > datetime.timedelta(seconds=GRACE_S)
        else:
            gone = not alive(worker)
        if gone:
            try:
                if _given_up(trial):
                    _explain_death(study, trial)
                study.tell(trial.number, state=TrialState.FAIL)
            except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                continue  # another worker was faster
            retry(study, trial)
            dead.append(trial.number)
    return dead


def _explain_death(study: optuna.Study, trial: FrozenTrial) -> None:
    reason = f"its worker was killed {MAX_RETRIES + 1} times, perhaps by the kernel for lack of memory; not tried again"
    for name, value in {"failure": "Killed", "reason": reason}.items():
        study._storage.set_trial_user_attr(trial._trial_id, name, value)
