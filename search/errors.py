"""Defines the errors of wrong usage, and of studies that stop.

SearchError                the base; the command line prints its one line and exits with `exit_status`
├── UsageError             wrong usage or input: exit status 2, nothing is written
│   ├── ConfigError        the study file or an override is wrong
│   ├── StorageError       the study's database can't be used
│   └── StudyMismatch      an existing study has another space, model or formula
└── StudyStopped           the study can't continue: exit status 1, nothing is lost
"""

from __future__ import annotations


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
