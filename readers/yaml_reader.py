"""Read YAML from outside, with limits on size, depth and what aliases expand to, and without duplicate keys."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from readers.errors import ReadError
from readers.regular import read_text

MOST_BYTES = 4_000_000
MOST_DEPTH = 50
TOO_DEEP = f"it is nested more than {MOST_DEPTH} levels deep"
MOST_VALUES = 200_000  # keys, values and lists, each as often as an alias repeats it
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclasses.dataclass
class _Open:
    """Counts what a mapping or a list holds while it is read.

    Attributes:
        anchor: The name that aliases repeat it by, or None.
        keys: The keys of a mapping so far; None for a list.
        size: The number of values in it, itself included.
        entries: The number of its keys and values so far.
    """

    anchor: str | None
    keys: set[str] | None
    size: int = 1
    entries: int = 0


def read(path: Path, *, most: int = MOST_BYTES) -> Any:
    """Return the values of a UTF-8 YAML file that holds one document.

    Raises:
        ReadError: When the file is no regular file, is too large, or `parse` refuses its text.
        OSError: When it is missing or can't be read.
    """
    return parse(read_text(path, most))


def parse(text: str) -> Any:
    """Return the values of a YAML text; None for an empty one.

    Raises:
        ReadError: When it is no single YAML document of plain values, is nested too deeply, holds a key twice, or
            holds too many values once its aliases are expanded.
    """
    try:
        _require_limits(text)
        return yaml.load(text, Loader=LOADER)  # noqa: S506 a safe loader
    except ReadError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # or a date or a number that is none
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, RecursionError) or "nesting depth" in reason:  # libyaml has a limit of its own
            raise ReadError(TOO_DEEP) from None
        raise ReadError(f"it is not YAML of plain values: {reason}") from None


def _require_limits(text: str) -> None:
    """Check depth, aliases and keys on the stream of events, before anything is built."""
    open_now = [_Open(None, None)]
    anchored: dict[str, int] = {}
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            _count_entry(open_now[-1], None)
            open_now.append(_Open(event.anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
            if len(open_now) > MOST_DEPTH:
                raise ReadError(TOO_DEEP)
            if event.anchor:
                anchored[event.anchor] = 0  # not complete
        elif isinstance(event, yaml.ScalarEvent):
            _count_entry(open_now[-1], event.value)
            open_now[-1].size += 1
            if event.anchor:
                anchored[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if anchored.get(event.anchor) == 0:
                raise ReadError(f"its alias *{event.anchor[:60]} is inside of what it repeats")
            _count_entry(open_now[-1], None)
            open_now[-1].size += anchored.get(event.anchor, 1)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            ended = open_now.pop()
            open_now[-1].size += ended.size
            if ended.anchor:
                anchored[ended.anchor] = ended.size
        if open_now[-1].size > MOST_VALUES:
            raise ReadError(f"it holds more than {MOST_VALUES:,} values, what its aliases repeat included")


def _count_entry(parent: _Open, scalar: str | None) -> None:
    """Count an entry of a mapping or a list, and refuse a key that the mapping has already."""
    if parent.keys is not None and parent.entries % 2 == 0 and scalar is not None:
        if scalar in parent.keys:
            raise ReadError(f"it has the key {ascii(scalar)[:60]} twice")
        parent.keys.add(scalar)
    parent.entries += 1
