"""Check the YAML files of a study: OmegaConf has no limits, and its errors don't name the file."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path
from types import NoneType
from typing import Any

from readers import yaml_reader
from readers.errors import ReadError
from search.errors import ConfigError

PLAIN = (str, int, float, datetime.date, NoneType)
MOST_ENTRIES = 5000  # of one section or list: Hydra takes seconds for more


def read(path: Path) -> Any:
    """Return the values of a study file or of a config group's file.

    Raises:
        ConfigError: It is no regular file of UTF-8 and YAML, or is too large, too deep, or expands to too much.
    """
    try:
        values = yaml_reader.read(path)
    except (OSError, ReadError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{shown(path)}: can't be read: {reason}; correct the file") from None
    if not isinstance(values, dict | NoneType):
        raise ConfigError(f"{shown(path)}: holds no KEY: VALUE lines; correct the file")
    waiting = [values]
    while waiting:
        section = waiting.pop()
        if not isinstance(section, dict | list):
            if not isinstance(section, PLAIN):
                raise ConfigError(f"{shown(path)}: holds a {type(section).__name__}; write a string, number or list")
            continue
        names = [key for key in section if not isinstance(key, str)] if isinstance(section, dict) else []
        if names:
            raise ConfigError(f"{shown(path)}: has the key {names[0]!r:.60}, which is no name; correct or quote it")
        if len(section) > MOST_ENTRIES:
            first = ", ".join(ascii(entry)[:40].strip("'") for entry in itertools.islice(section, 3))
            raise ConfigError(
                f"{shown(path)}: holds {len(section):,} {'keys' if isinstance(section, dict) else 'entries'} in one "
                f"place ({first}, …), and a study file has a few dozen; correct the file"
            )
        waiting += section.values() if isinstance(section, dict) else section
    return values


def shown(path: Path) -> str:
    """Return a path as messages name it: relative where it is below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
