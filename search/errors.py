"""Defines the errors of wrong usage, and of studies that stop.

SearchError                the base; the command line prints its one line and exits with `exit_status`
├── UsageError             wrong usage or input: exit status 2, nothing is written
│   ├── ConfigError        the study file or an override is wrong
│   ├── StorageError       the study's database can't be used
│   └── StudyMismatch      an existing study has another space, model or formula
└── StudyStopped           the study can't continue: exit status 1, nothing is lost
"""

from __future__ import annotations

import errno


class SearchError(Exception):
    """The base of this package's errors; the message is one line."""

    exit_status = 1


class UsageError(SearchError):
    """Wrong usage or input; nothing was written."""

    exit_status = 2


class ConfigError(UsageError):
    """The study file or an override is wrong."""


class StorageError(UsageError):
    """The study's database can't be used."""


class StudyMismatch(UsageError):
    """An existing study has another space, model or formula."""


class StudyStopped(SearchError):
    """The study can't continue; its finished trials are kept."""


NO_SPACE = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file too large",
}


def no_space(error: BaseException) -> str | None:
    """Return one line about a full disk, with its place and what to do, if that caused this error; otherwise None."""
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        said = NO_SPACE.get(number or 0) or next(
            (words for words in NO_SPACE.values() if words in str(cause).lower()), ""
        )
        if said:
            place = getattr(cause, "filename", None) or "disk"
            return f"{place}: {said}; nothing is lost: free some space there, and run the same command again"
        cause = cause.__cause__ or cause.__context__
    return None
