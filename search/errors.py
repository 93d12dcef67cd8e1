"""What a person can get wrong, or what stops a study.

SearchError                one line; the command line prints it and exits with `exit_status`
├── UsageError             wrong usage or input: exit status 2, nothing written
│   ├── ConfigError        the study file or an override
│   ├── StorageError       the study's database can't be used
│   └── StudyMismatch      an existing study was made with another space, model or formula
└── StudyStopped           the study can't go on: exit status 1, nothing lost
"""

from __future__ import annotations


class SearchError(Exception):
    exit_status = 1


class UsageError(SearchError):
    exit_status = 2


class ConfigError(UsageError):
    pass


class StorageError(UsageError):
    pass


class StudyMismatch(UsageError):
    pass


class StudyStopped(SearchError):
    pass
