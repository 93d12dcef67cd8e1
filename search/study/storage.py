"""Opens the study database, and creates, resumes or loads a study in it.

This module knows no model and no metric.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import make_url

from evaluator.errors import install
from search import secrets
from search.config import references
from search.errors import StorageError, StudyMismatch, UsageError
from search.setup.definition import filled
from search.study import exclusive
from search.study.heartbeat import HEARTBEAT_S
from search.study.steady import Patience, SteadyStorage
from search.study.trials import GRACE_S, requeue

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with Study.optimize")
READING = Patience()  # of commands that only read: none
BUSY_S = 10  # for which SQLite itself waits for another process that writes
CREATIONS = 10
OTHER_NAMES = {"evaluation.threads": "the threads of an engine, the cores over --workers,"}  # where no key sets it


def open_storage(url: str, patience: Patience = READING) -> SteadyStorage:
    """Open the study database at `url`, or create it; SQLite gets a write-ahead log and a busy timeout.

    Raises:
        StorageError: The URL is wrong, or the database can't be used.
    """
    safe = _safe(url)
    url, options = _prepared(url)
    for name in ("sqlalchemy.pool", "psycopg"):  # a lost connection is told in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        if url.startswith("sqlite"):
            _prepare_place(url)
        with exclusive.exclusively(url, options):
            if url.startswith("sqlite"):
                _write_ahead(url)
            return SteadyStorage(_database(url, options), safe, patience)
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
        reason = secrets.line_of(getattr(error, "orig", None) or error)
        check = "that it is a SQLite file that can be written" if url.startswith("sqlite") else "that the server runs"
        hint = f"check the URL and {check}"
        if isinstance(error, ImportError) and "psycopg" in reason:
            hint = install("cluster")
        raise StorageError(f"storage {safe}: {reason}; {hint}") from None


def _database(url: str, options: dict[str, Any]) -> RDBStorage:
    """Open the database; two processes that create its tables at the same time disturb each other for moments."""
    for attempt in range(CREATIONS):
        try:
            return RDBStorage(
                url,
                engine_kwargs={"connect_args": options, "pool_pre_ping": True},
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                heartbeat_stale_trial_callback=lambda study, trial: requeue(study),
            )
        except (sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:
            created = any(word in str(error).lower() for word in ("already exists", "unique", "duplicate"))
            if not created or attempt == CREATIONS - 1:
                raise
            time.sleep(0.2)
    raise AssertionError("the loop above returns or raises")


def _safe(url: str) -> str:
    """Return the URL as messages show it.

    Raises:
        StorageError: It is none, or another host would be read in it than was meant.
    """
    secrets.remember_url(url)
    try:
        parsed = make_url(url)
    except sqlalchemy.exc.ArgumentError:
        raise StorageError(
            "storage: not a database URL; write sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        ) from None
    except ValueError:
        raise StorageError(
            "storage: the port in its URL is no number; write postgresql://USER@HOST:5432/DATABASE, and percent-encode "
            "what is special in a user name or password (%40 for @, %2F for /, %3A for :)"
        ) from None
    if not parsed.drivername.startswith("sqlite"):
        misread = (parsed.username, parsed.host, parsed.database, url.partition("?")[2].partition("=")[0])
        if any("@" in (part or "") for part in misread):
            raise StorageError(
                "storage: its user name or password holds a character that has a meaning in a URL; percent-encode it "
                "(%40 for @, %2F for /, %3A for :, %3F for ?, %23 for #), or give the password in PGPASSWORD"
            )
    return secrets.masked_url(url)


def _prepared(url: str) -> tuple[str, dict[str, Any]]:
    parsed = make_url(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    options: dict[str, Any] = {}
    if parsed.drivername.startswith("sqlite"):
        options = {"timeout": BUSY_S}
    elif parsed.drivername.startswith("postgresql"):
        options = {"connect_timeout": 10}
    return parsed.render_as_string(hide_password=False), options


def _prepare_place(url: str) -> None:
    """Create the directory of a SQLite file."""
    path = make_url(url).database
    if not path or path == ":memory:":
        raise StorageError("storage sqlite: needs a file, since a killed study goes on from it; write sqlite:///FILE")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"storage sqlite:///{path}: {error}; choose a writable place and a SQLite file") from None


def _write_ahead(url: str) -> None:
    path = make_url(url).database
    try:
        with contextlib.closing(sqlite3.connect(str(path), timeout=60)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    except sqlite3.Error as error:
        raise StorageError(f"storage sqlite:///{path}: {error}; choose a writable place and a SQLite file") from None


def exists(url: str) -> bool:
    """Return whether the database exists, so that opening it would not create one. Raises StorageError for no URL."""
    _safe(url)
    parsed = make_url(url)
    return not (parsed.drivername.startswith("sqlite") and parsed.database) or Path(parsed.database).is_file()


def find(storage: BaseStorage, name: str, definition: Mapping[str, Any]) -> optuna.Study | None:
    """Return the study `name`, or None where the storage has none, or one that is only just being created.

    Raises:
        StudyMismatch: It was created with another definition.
    """
    if name not in _names(storage) or _is_blank(optuna.load_study(storage=storage, study_name=name)):
        return None
    return create_or_resume(storage, name, definition)


def create_or_resume(
    storage: BaseStorage, name: str, definition: Mapping[str, Any], metric: str = "score"
) -> optuna.Study:
    """Return the study `name`: create it with `definition` (JSON), or resume the one with the same definition.

    Integer ranges are not part of a definition: they may change when a study is resumed. `metric` names the values of
    trials.

    Raises:
        StudyMismatch: It was created with another definition; the message lists the differences.
    """
    if name not in _names(storage):
        with contextlib.suppress(optuna.exceptions.DuplicatedStudyError):  # another process was faster
            optuna.create_study(storage=storage, study_name=name, direction="maximize")
    study = optuna.load_study(storage=storage, study_name=name)
    if _is_blank(study):  # created above, or by a run that was killed before it came to the lines below
        study.set_user_attr("definition", dict(definition))
        study.set_metric_names([metric])
        return study
    known = study.user_attrs.get("definition")
    if known is None:
        raise StudyMismatch(f"study {name!r} was not created by optuna-search; choose another --study-name")
    require_same(name, known, json.loads(json.dumps(definition)))
    return study


def require_same(name: str, known: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Compare two definitions of the study `name`, both JSON values.

    Raises:
        StudyMismatch: They differ; the message lists the differences.
    """
    known, asked = filled(known), filled(asked)
    if not _same(known, asked):
        differing = "; ".join(_differences(known, asked))
        raise StudyMismatch(
            f"study {name!r} exists with other settings: {differing}. Use its settings, or choose another --study-name"
        )


def _names(storage: BaseStorage) -> list[str]:
    return [study.study_name for study in optuna.get_all_study_summaries(storage, include_best_trial=False)]


def _is_blank(study: optuna.Study) -> bool:
    """Return whether a study holds nothing at all, so that it can become ours."""
    maximized = study.directions == [optuna.study.StudyDirection.MAXIMIZE]
    return maximized and not study.user_attrs and not study.get_trials(deepcopy=False)


def load(storage: BaseStorage, name: str) -> optuna.Study:
    """Load the study `name`.

    Raises:
        UsageError: The storage has no such study.
    """
    try:
        return optuna.load_study(storage=storage, study_name=name)
    except KeyError:
        names = sorted(_names(storage))
        raise UsageError(
            f"study {name!r}: not in this storage, which holds {', '.join(names) or 'none'}; start it "
            "with `optuna-search run` and the same options"
        ) from None


def _same(known: Any, asked: Any) -> bool:
    """Return whether two definitions are equal, where one may hold `${oc.env:NAME}` and the other its value."""
    if isinstance(known, dict) and isinstance(asked, dict):
        return known.keys() == asked.keys() and all(_same(value, asked[key]) for key, value in known.items())
    if isinstance(known, str) and isinstance(asked, str) and known != asked:
        return references.restored(known) == references.restored(asked)
    return bool(known == asked)


def _differences(known: Any, asked: Any, where: str = "") -> list[str]:
    if isinstance(known, dict) and isinstance(asked, dict):
        differences: list[str] = []
        for key in sorted({*known, *asked}):
            if known.get(key) != asked.get(key):
                differences += _differences(known.get(key), asked.get(key), f"{where}.{key}" if where else key)
        return differences
    name = OTHER_NAMES.get(where, where)
    return [f"{name} is {json.dumps(known)} there and {json.dumps(asked)} here"]
