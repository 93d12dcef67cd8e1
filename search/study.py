"""Optuna studies: storages, samplers and pruners; create, go on, retry what was killed.

Knows no model and no metric.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import socket
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url

from search.config import Pruner, Sampler
from search.errors import StorageError, StudyMismatch, UsageError

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

HEARTBEAT_S = 10
GRACE_S = 60
MAX_RETRIES = 5
INTERRUPTED = "Interrupted"  # the kind of failure that is tried again


def open_storage(url: str) -> RDBStorage:
    """The study database behind `url`. SQLite gets WAL and a long busy time-out. Raises StorageError."""
    safe = _safe(url)
    url, options = _prepared(url)
    if url.startswith("sqlite"):
        _write_ahead(url)
    try:
        return RDBStorage(
            url,
            engine_kwargs={"connect_args": options, "pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT_S,
            grace_period=GRACE_S,
            heartbeat_stale_trial_callback=retry,
        )
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise StorageError(f"storage {safe}: {reason}; check the URL and that the database server runs") from None


def _safe(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        raise StorageError(
            "storage: not a database URL; write sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        ) from None


def _prepared(url: str) -> tuple[str, dict[str, Any]]:
    parsed = make_url(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    options: dict[str, Any] = {}
    if parsed.drivername.startswith("sqlite"):
        options = {"timeout": 60}
    elif parsed.drivername.startswith("postgresql"):
        options = {"connect_timeout": 10}
    return parsed.render_as_string(hide_password=False), options


def _write_ahead(url: str) -> None:
    path = make_url(url).database
    if not path or path == ":memory:":
        raise StorageError("storage sqlite: needs a file, since a killed study goes on from it; write sqlite:///FILE")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=60)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()
    except (sqlite3.Error, OSError) as error:
        raise StorageError(f"storage sqlite:///{path}: {error}; choose a writable place and a SQLite file") from None


def exists(url: str) -> bool:
    """Whether opening the storage would find a database rather than make one."""
    return not url.startswith("sqlite:///") or Path(url.removeprefix("sqlite:///")).is_file()


def find(storage: RDBStorage, name: str, definition: Mapping[str, Any]) -> optuna.Study | None:
    """The study `name`, or None. Raises StudyMismatch, as `create_or_resume` does."""
    if name not in {
        summary.study_name for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)
    }:
        return None
    return create_or_resume(storage, name, definition)


def create_or_resume(storage: RDBStorage, name: str, definition: Mapping[str, Any]) -> optuna.Study:
    """The study `name`, made with `definition` (JSON) or found with the same one.

    Raises StudyMismatch, which says what differs, when it was made with another. Integer ranges are not part
    of a definition: they may change when a study goes on.
    """
    if name not in {
        summary.study_name for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)
    }:
        try:
            study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
            study.set_user_attr("definition", dict(definition))
            study.set_metric_names(["score"])
            return study
        except optuna.exceptions.DuplicatedStudyError:
            pass  # another worker was faster
    study = optuna.load_study(storage=storage, study_name=name)
    there = study.user_attrs.get("definition")
    if there is None:
        raise StudyMismatch(f"study {name!r} was not made by optuna-search; choose another --study-name")
    if there != json.loads(json.dumps(definition)):
        differing = "; ".join(_differences(there, json.loads(json.dumps(definition))))
        raise StudyMismatch(
            f"study {name!r} exists with other settings: {differing}. Go on with those, or give "
            "--study-name another name"
        )
    return study


def load(storage: RDBStorage, name: str) -> optuna.Study:
    try:
        return optuna.load_study(storage=storage, study_name=name)
    except KeyError:
        names = sorted(s.study_name for s in optuna.get_all_study_summaries(storage, include_best_trial=False))
        raise UsageError(
            f"study {name!r}: not in this storage, which holds {', '.join(names) or 'none'}; start it "
            "with `optuna-search run`"
        ) from None


def _differences(there: Any, asked: Any, where: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(asked, dict):
        found: list[str] = []
        for key in sorted({*there, *asked}):
            if there.get(key) != asked.get(key):
                found += _differences(there.get(key), asked.get(key), f"{where}.{key}" if where else key)
        return found
    return [f"{where} is {json.dumps(there)} there and {json.dumps(asked)} here"]


# -- samplers and pruners ------------------------------------------------------------------------------------


def sampler(settings: Sampler, seed: int, worker: int, done: int) -> optuna.samplers.BaseSampler:
    """The sampler for a worker's next trial.

    Seeded anew for every trial from what is in the storage (`done` finished trials), not from a generator's
    state in memory: a study that was killed draws what it would have drawn.
    """
    drawn = int(np.random.SeedSequence([seed, worker, done]).generate_state(1)[0])
    if settings.name == "random":
        return optuna.samplers.RandomSampler(seed=drawn)
    return optuna.samplers.TPESampler(seed=drawn, n_startup_trials=settings.n_startup_trials)


def pruner(settings: Pruner, shards: int) -> optuna.pruners.BasePruner:
    if settings.name == "wilcoxon":
        return optuna.pruners.WilcoxonPruner(p_threshold=settings.p_threshold, n_startup_steps=settings.n_startup_steps)
    if settings.name == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=settings.n_startup_trials, n_warmup_steps=settings.n_startup_steps, n_min_trials=2
        )
    if settings.name == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=max(1, settings.n_startup_steps),
            max_resource=shards,
            reduction_factor=settings.reduction_factor,
        )
    return optuna.pruners.NopPruner()


def wants_running_mean(settings: Pruner) -> bool:
    """Wilcoxon pairs the raw value of each shard; the others compare one curve with another."""
    return settings.name in ("median", "hyperband")


# -- which trials count, and which are tried again -----------------------------------------------------------


def finished(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that ended by themselves: measured, pruned, or failed with a reason.

    One that was killed or interrupted is FAIL too, but its successor counts in its place.
    """
    return [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or _failed(trial)]


def _failed(trial: FrozenTrial) -> bool:
    if trial.state != TrialState.FAIL or trial.user_attrs.get("failure") == INTERRUPTED:
        return False
    return "failure" in trial.user_attrs or _given_up(trial)


def _given_up(trial: FrozenTrial) -> bool:
    """A trial whose plan has killed its worker so often would kill the study for ever."""
    return len(RetryHeartbeatStaleTrialCallback.retry_history(trial)) >= MAX_RETRIES


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a killed trial's parameters again, up to MAX_RETRIES times; what it said of itself is not carried over."""
    if not _given_up(trial):
        trial.user_attrs = {}
        RetryHeartbeatStaleTrialCallback()(study, trial)


def retry_interrupted(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue the parameters of a trial that a person stopped; that says nothing against its plan."""
    trial.system_attrs = {name: value for name, value in trial.system_attrs.items() if name != "retry_history"}
    retry(study, trial)


def identify_worker() -> dict[str, Any]:
    """Says which process runs a trial, so that its death can be seen at once on the same machine."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """The process's start time, so that a recycled pid is not taken for the dead worker; None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:  # no /proc (macOS): the pid alone must do
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def retry_dead(study: optuna.Study) -> list[int]:
    """Fail the RUNNING trials whose worker is gone, and queue each again; returns their numbers.

    A worker of this machine is looked up by its pid. Trials that never said who runs them are given GRACE_S;
    those of other machines are Optuna's heartbeat's to judge (https://optuna.readthedocs.io, RDBStorage).
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
    reason = (
        f"its worker was killed {MAX_RETRIES + 1} times, as by the kernel when memory runs out; it is not tried again"
    )
    for name, value in {"failure": "Killed", "reason": reason}.items():
        study._storage.set_trial_user_attr(trial._trial_id, name, value)


def alive(worker: dict[str, Any]) -> bool:
    """Whether the process that `identify_worker` named runs; one of another machine is taken to."""
    return bool(worker["host"] != socket.gethostname() or _started(worker["pid"]) == worker["started"])


def process_alive(pid: int) -> bool:
    return _started(pid) is not None


class Stop:
    """Within it, SIGINT and SIGTERM raise KeyboardInterrupt and are remembered: a library that swallows the exception,
    as some do while they are being imported, does not swallow the wish. Asked for a second time, it is only raised.

    In `held` it is remembered alone: Optuna, interrupted between taking a trial and running it, would leave it RUNNING.
    """

    def __init__(self) -> None:
        self.asked = self._held = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._raise_what_was_meant(error)

    def _raise_what_was_meant(self, error: BaseException | None) -> None:
        """A storage that was interrupted in a commit calls it an error of its own."""
        if self.asked and isinstance(error, StorageInternalError):
            raise KeyboardInterrupt from error

    def _on_signal(self, number: int, frame: object) -> None:
        again, self.asked = self.asked, True
        if again or not self._held:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within it a signal waits for `check`, or for `released`."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """A part of `held` in which a signal raises, also one that came before."""
        before, self._held = self._held, False
        try:
            self.check()
            yield
        except StorageInternalError as error:
            self._raise_what_was_meant(error)
            raise
        finally:
            self._held = before

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt
