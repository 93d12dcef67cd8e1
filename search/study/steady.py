"""The study's database as trials use it: a signal never interrupts a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from optuna.storages import _CachedStorage

from search import processes

CALLS = (  # what Optuna calls on a storage
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
    "create_new_trial",
    "set_trial_param",
    "set_trial_state_values",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_trial_id_from_study_id_trial_number",
    "get_trial",
    "get_all_trials",
    "get_best_trial",
    "record_heartbeat",
    "_get_stale_trial_ids",
    "remove_session",
)


def _steadily(name: str) -> Callable[..., Any]:
    method = getattr(_CachedStorage, name)

    @functools.wraps(method)
    def call(self: SteadyStorage, *args: Any, **kwargs: Any) -> Any:
        return processes.uninterrupted(lambda: method(self, *args, **kwargs))

    return call


class SteadyStorage(_CachedStorage):
    """SteadyStorage is Optuna's cached database, whose calls end before a signal raises KeyboardInterrupt.

    An exception out of the middle of a transaction would leave it open, and the database locked for the next call.
    """


for _name in CALLS:
    setattr(SteadyStorage, _name, _steadily(_name))
