"""Check the YAML files that Hydra is about to read: it has no limits, and its errors don't name the file."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator, Sequence
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


def require_readable(names: Sequence[str], directories: Sequence[Path]) -> None:
    """Read every file that the composition of `names` reads, and check it.

    Args:
        names: The names of files below a directory, such as "demo" or "model/smollm2-135m".
        directories: The directories along the search path; the first one that has a file counts.

    Raises:
        ConfigError: A file can't be read.
    """
    waiting, seen = list(names), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        paths = (directory / f"{name}.yaml" for directory in directories)
        path = next((path for path in paths if path.exists()), None)
        if path is not None:  # Hydra says which one is missing
            waiting += _named_in(read(path), name.rpartition("/")[0])


def _named_in(values: Any, group: str) -> Iterator[str]:
    """Yield the files that a file's `defaults` name; `group` is the file's own group."""
    defaults = values.get("defaults") if isinstance(values, dict) else None
    for entry in defaults if isinstance(defaults, list) else ():
        for key, value in entry.items() if isinstance(entry, dict) else [("", entry)]:
            for choice in value if isinstance(value, list) else [value]:
                if isinstance(key, str) and isinstance(choice, str):
                    yield _place(key, choice, group)


def _place(key: str, choice: str, group: str) -> str:
    """Return the file of one entry, such as `override /model: smollm2-135m`; a leading / is the top directory."""
    where = key.split("@")[0].split()[-1:]
    path = "/".join([*where, choice.split("@")[0].strip()])
    path = path.removesuffix(".yaml").removesuffix(".yml")
    return path.strip("/") if path.startswith("/") or not group else f"{group}/{path}"
