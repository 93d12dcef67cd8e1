"""Tells what is wrong with a study's database, and whether it can pass by itself."""

from __future__ import annotations

import dataclasses
import sqlite3

import sqlalchemy.exc
from optuna.exceptions import StorageInternalError

from compressors.errors import first_line

DATABASE_ERRORS = (StorageInternalError, sqlalchemy.exc.SQLAlchemyError)
DISK_FULL = "53100"  # PostgreSQL's codes: https://www.postgresql.org/docs/current/errcodes-appendix.html
FOR_GOOD = ("28", "3D")  # wrong user or password; no such database


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with a database.

    Attributes:
        reason: The driver's words, in one line.
        passes: Whether it can pass by itself, such as a server that restarts.
        full: Whether the disk is full.
    """

    reason: str
    passes: bool
    full: bool


def of(error: BaseException) -> Fault | None:
    """Return the fault of the database that raised this error; None for an error in what was to be stored."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, sqlalchemy.exc.DBAPIError) and (
            cause.connection_invalidated
            or isinstance(cause, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError)
        ):
            return _of_driver(cause.orig or cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _of_driver(error: BaseException) -> Fault:
    reason = first_line(error).removesuffix(":")
    if isinstance(error, sqlite3.Error):
        name = getattr(error, "sqlite_errorname", "")
        return Fault(reason, name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")), name == "SQLITE_FULL")
    code = getattr(error, "sqlstate", None) or ""
    return Fault(reason, not code.startswith((DISK_FULL, *FOR_GOOD)), code == DISK_FULL)
