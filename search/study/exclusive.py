"""Holds a lock between all processes that use a study's database, on one machine or several.

Optuna's calls are transactions of their own. What takes several, such as counting trials before one more is begun, is
done under this lock. A killed process releases it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy
from sqlalchemy.engine import make_url

WAIT_S = 10.0  # a stopped process may hold the lock; after this time the others continue without it
POLL_S = 0.05
ADVISORY_KEY = 0x6F7074_7365  # "opt", "se": any number that no other program takes in the same database


class Held(Protocol):
    """A lock that is held."""

    def kept(self) -> bool:
        """Return whether it is still held: a database server that restarts drops it."""


class _Always:
    def kept(self) -> bool:
        return True


class _Advisory:
    def __init__(self, connection: sqlalchemy.Connection) -> None:
        self._connection = connection

    def kept(self) -> bool:
        try:
            self._connection.exec_driver_sql("SELECT 1")
            self._connection.commit()
        except sqlalchemy.exc.SQLAlchemyError:
            return False
        return True


@contextlib.contextmanager
def exclusively(url: str, connect_args: dict[str, Any]) -> Iterator[Held]:
    """Hold the lock of the database at `url`; other kinds of database than SQLite and PostgreSQL have none.

    Raises:
        SQLAlchemyError: The server can't be reached.
    """
    parsed = make_url(url)
    if parsed.drivername.startswith("postgresql"):
        with _advisory_lock(url, connect_args) as held:
            yield held
    elif parsed.drivername.startswith("sqlite") and parsed.database:
        with _directory_lock(Path(parsed.database).absolute().parent):
            yield _Always()
    else:
        yield _Always()


@contextlib.contextmanager
def _directory_lock(directory: Path) -> Iterator[None]:
    """Lock the database's directory, which needs no further file."""
    try:
        lock = os.open(directory, os.O_RDONLY)
    except OSError:  # what is wrong with it is told when the database is opened
        yield
        return
    try:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL_S)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _advisory_lock(url: str, connect_args: dict[str, Any]) -> Iterator[Held]:
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, connect_args=connect_args)
    with contextlib.ExitStack() as stack:
        connection = engine.connect()
        stack.callback(_close, connection)
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            taken = connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({ADVISORY_KEY})").scalar()
            connection.commit()  # the lock belongs to the session, not to the transaction
            if taken:
                break
            time.sleep(POLL_S)
        yield _Advisory(connection)


def _close(connection: sqlalchemy.Connection) -> None:
    """Close the connection, and with it the session that holds the lock."""
    with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):
        connection.close()
