"""The study's database as trials use it.

- A signal never interrupts a call: an exception out of the middle of a transaction would leave it open, and the
  database locked for the next call.
- A call that fails because the server is away, or another process holds the database, is tried again for a while.
- A trial that is tried again takes the place in the queue that it had.
- A trial counts as stale only if its worker has not been heard of for longer than an outage explains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Container
from typing import Any, TypeVar

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, _CachedStorage
from optuna.trial import FrozenTrial, TrialState

from search import processes
from search.errors import StorageError, StudyStopped
from search.study import exclusive, faults
from search.study.heartbeat import HEARTBEAT_S

FIRST_DELAY_S, LAST_DELAY_S = 0.1, 2.0
ASIDE_S = 2.0 * HEARTBEAT_S  # a worker that an outage or a pause kept silent is heard of again within this time
Result = TypeVar("Result")

CALLS = (  # what Optuna calls on a storage, except those that are defined below
    "create_new_study",
    "delete_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "set_trial_param",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_trial_id_from_study_id_trial_number",
    "get_trial",
    "get_best_trial",
    "remove_session",
)


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a database that is away is waited for.

    Attributes:
        seconds: The time for which a call is tried again; 0 for a command that only reads.
        warn: Told once when the database goes away.
    """

    seconds: float = 0.0
    warn: Callable[[str], None] = lambda text: None


class SteadyStorage(_CachedStorage):
    """SteadyStorage is Optuna's cached database, with calls that are whole and that outlast a server's restart.

    Args:
        backend: The database.
        name: Its URL without a password, for messages.
        patience: How long it is waited for.
    """

    def __init__(self, backend: RDBStorage, name: str, patience: Patience) -> None:
        super().__init__(backend)
        self._name = name
        self._patience = patience
        self._lock_of_state = threading.Lock()
        self._away = False
        self._given_up = ""
        self._silent_since: dict[int, float] = {}

    @property
    def plain(self) -> RDBStorage:
        """The database itself."""
        return self._backend

    def steadily(self, attempt: Callable[[], Result], again: Callable[[], Result] | None = None) -> Result:
        """Return what `attempt` returns; while the database is away, try again.

        Args:
            attempt: The call.
            again: What is called instead after a first attempt that may have been carried out all the same.

        Raises:
            StudyStopped: The database stayed away, its disk is full, or it can't be used.
            StorageError: The same, for a command that only reads.
            KeyboardInterrupt: A signal arrived.
        """
        if self._given_up:
            raise StudyStopped(self._given_up)
        started, delay, call = time.monotonic(), FIRST_DELAY_S, attempt
        while True:
            try:
                result = processes.uninterrupted(call)
            except faults.DATABASE_ERRORS as error:
                fault = faults.of(error)
                if fault is None:
                    raise
                self._wait(fault, time.monotonic() - started, delay)
                delay, call = min(2.0 * delay, LAST_DELAY_S), again or attempt
                continue
            self._away = False
            return result

    def _wait(self, fault: faults.Fault, waited_s: float, delay: float) -> None:
        patience = self._patience
        if patience.seconds == 0.0:
            raise StorageError(f"storage {self._name}: {fault.reason}; try again once it can be used") from None
        if processes.stop_asked():
            raise KeyboardInterrupt
        if not fault.passes or waited_s >= patience.seconds:
            self._given_up = f"storage {self._name}: {_advice(fault, waited_s)}"
            raise StudyStopped(self._given_up) from None
        with self._lock_of_state:
            first, self._away = not self._away, True
        if first:
            patience.warn(f"storage {self._name}: {fault.reason}; trying again for {patience.seconds:g} s")
        time.sleep(max(0.0, min(delay, patience.seconds - waited_s)))

    def exclusively(self, call: Callable[[exclusive.Held], Result]) -> Result:
        """Return what `call` returns, while no other process is in such a block on the same database."""
        arguments = self._backend.engine_kwargs.get("connect_args", {})

        def locked() -> Result:
            with contextlib.ExitStack() as stack:
                held = self.steadily(lambda: stack.enter_context(exclusive.exclusively(self._backend.url, arguments)))
                return call(held)

        return processes.uninterrupted(locked)

    # -- calls that are more than Optuna's ----------------------------------------------------------------------

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create a trial; one that was created although the answer was lost is not created again."""
        create = super().create_new_trial

        def again() -> int:
            if template_trial is not None and template_trial.system_attrs:
                for trial in self.get_all_trials(study_id, deepcopy=False):
                    if trial.system_attrs == template_trial.system_attrs:
                        return trial._trial_id
            return create(study_id, template_trial)

        return self.steadily(lambda: create(study_id, template_trial), again)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        """Set a trial's state; one that was set although the answer was lost is as it should be."""
        store = super().set_trial_state_values

        def again() -> bool:
            try:
                return store(trial_id, state, values)
            except UpdateFinishedTrialError:
                if self._backend.get_trial(trial_id).state != state:
                    raise
                return True

        return self.steadily(lambda: store(trial_id, state, values), again)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials by number; waiting trials in the order in which they were first queued."""
        read = super().get_all_trials
        trials = self.steadily(lambda: read(study_id, deepcopy, states))
        if states == (TrialState.WAITING,):  # from which Optuna takes the first
            trials.sort(key=lambda trial: trial.system_attrs.get("failed_trial", trial.number))
        return trials

    def record_heartbeat(self, trial_id: int) -> None:
        """Record a heartbeat; while the database is away it is left out."""
        with contextlib.suppress(*faults.DATABASE_ERRORS):
            super().record_heartbeat(trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Return the running trials whose worker is silent, and still is some time after that was first seen.

        After an outage, or a pause of the whole machine, every worker has been silent for long.
        """
        read = super()._get_stale_trial_ids
        silent = self.steadily(lambda: read(study_id))
        now = time.monotonic()
        self._silent_since = {trial: self._silent_since.get(trial, now) for trial in silent}
        return [trial for trial, since in self._silent_since.items() if now - since >= ASIDE_S]


def _advice(fault: faults.Fault, waited_s: float) -> str:
    if fault.full:
        return f"{fault.reason}; nothing is lost: free some space on its disk, and run the same command again"
    if not fault.passes:
        return f"{fault.reason}; nothing is lost: mend that, and run the same command again"
    return (
        f"{fault.reason}, for {waited_s:.0f} s; nothing is lost: see that the database can be used, and run the same "
        "command again, or set a longer storage_patience"
    )


def _steadily(name: str) -> Callable[..., Any]:
    method = getattr(_CachedStorage, name)

    @functools.wraps(method)
    def call(self: SteadyStorage, *args: Any, **kwargs: Any) -> Any:
        return self.steadily(lambda: method(self, *args, **kwargs))

    return call


for _name in CALLS:
    setattr(SteadyStorage, _name, _steadily(_name))
