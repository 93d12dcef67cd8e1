"""Opens the study database, and creates, resumes or loads a study in it.

This module knows no model and no metric.
"""

from __future__ import annotations

import json
import sqlite3
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import make_url

from search.errors import StorageError, StudyMismatch, UsageError
from search.study.heartbeat import HEARTBEAT_S
from search.study.steady import SteadyStorage
from search.study.trials import GRACE_S, retry

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with Study.optimize")


def open_storage(url: str) -> SteadyStorage:
    """Open the study database at `url`; SQLite gets a write-ahead log and a long busy timeout.

    Raises:
        StorageError: The URL is wrong, or the database can't be used.
    """
    safe = _safe(url)
    url, options = _prepared(url)
    if url.startswith("sqlite"):
        _write_ahead(url)
    try:
        return SteadyStorage(
            RDBStorage(
                url,
                engine_kwargs={"connect_args": options, "pool_pre_ping": True},
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                heartbeat_stale_trial_callback=retry,
            )
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
    """Return whether the database exists, so that opening it would not create one."""
    return not url.startswith("sqlite:///") or Path(url.removeprefix("sqlite:///")).is_file()


def find(storage: BaseStorage, name: str, definition: Mapping[str, Any]) -> optuna.Study | None:
    """Return the study `name`, or None where the storage has none.

    Raises:
        StudyMismatch: It was created with another definition.
    """
    if name not in {
        summary.study_name for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)
    }:
        return None
    return create_or_resume(storage, name, definition)


def create_or_resume(storage: BaseStorage, name: str, definition: Mapping[str, Any]) -> optuna.Study:
    """Return the study `name`: create it with `definition` (JSON), or resume the one with the same definition.

    Integer ranges are not part of a definition: they may change when a study is resumed.

    Raises:
        StudyMismatch: It was created with another definition; the message lists the differences.
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
    known = study.user_attrs.get("definition")
    if known is None:
        raise StudyMismatch(f"study {name!r} was not created by optuna-search; choose another --study-name")
    if known != json.loads(json.dumps(definition)):
        differing = "; ".join(_differences(known, json.loads(json.dumps(definition))))
        raise StudyMismatch(
            f"study {name!r} exists with other settings: {differing}. Use its settings, or choose another --study-name"
        )
    return study


def load(storage: BaseStorage, name: str) -> optuna.Study:
    """Load the study `name`.

    Raises:
        UsageError: The storage has no such study.
    """
    try:
        return optuna.load_study(storage=storage, study_name=name)
    except KeyError:
        names = sorted(s.study_name for s in optuna.get_all_study_summaries(storage, include_best_trial=False))
        raise UsageError(
            f"study {name!r}: not in this storage, which holds {', '.join(names) or 'none'}; start it "
            "with `optuna-search run`"
        ) from None


def _differences(known: Any, asked: Any, where: str = "") -> list[str]:
    if isinstance(known, dict) and isinstance(asked, dict):
        differences: list[str] = []
        for key in sorted({*known, *asked}):
            if known.get(key) != asked.get(key):
                differences += _differences(known.get(key), asked.get(key), f"{where}.{key}" if where else key)
        return differences
    return [f"{where} is {json.dumps(known)} there and {json.dumps(asked)} here"]
