"""Directories that appear whole or not at all: made beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from search.errors import UsageError
from search.processes import process_alive

CACHE = Path(os.environ.get("OPTUNA_SEARCH_CACHE", "~/.cache/optuna-search")).expanduser()


def refuse_foreign(to: Path, what: str, *sources: Path) -> None:
    """Raises UsageError when `to` holds something that is not a model, which must not be replaced, or is one of the
    models that are read."""
    if any(to.resolve() == source.resolve() for source in sources):
        raise UsageError(f"{what} to {to}: is the model that is read, and would be lost; name another with --save-path")
    for place in (to, *to.parents):
        if place.exists() and not place.is_dir():
            raise UsageError(f"{what} to {to}: {'is' if place == to else f'{place} is'} a file; name a directory")
    if to.is_dir() and any(to.iterdir()) and not (to / "config.json").is_file():
        raise UsageError(f"{what} to {to}: holds files that are no model; name an empty or a new directory")


@contextlib.contextmanager
def beside(to: Path, what: str) -> Iterator[Path]:
    """The path of a directory beside `to`, to be made in the block; at its end it takes the place of `to`.

    After an error nothing is left of it, and what was in `to` is untouched. Raises UsageError for the file system's.
    """
    refuse_foreign(to, what)
    to = Path(os.path.abspath(to))  # noqa: PTH100 a link that is named stays a link
    prefix = f".{to.name}.{what}-"
    scratch, old = to.with_name(f"{prefix}{os.getpid()}"), to.with_name(f"{prefix}{os.getpid()}-old")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        _sweep(to.parent, prefix)
        yield scratch
        if to.exists():
            to.replace(old)
        try:
            scratch.replace(to)
        except OSError:
            if old.exists():
                old.replace(to)
            raise
    except OSError as error:
        raise UsageError(f"{what} to {to}: {error.strerror or error}; nothing was changed there") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sweep(directory: Path, prefix: str) -> None:
    """What others left there when they were killed."""
    for dots in ("", "."):  # what is written into a scratch directory is made beside that, with a dot more
        for left in directory.glob(f"{dots}{prefix}*"):
            pid = re.match(r"\d+", left.name.removeprefix(dots).removeprefix(prefix))
            if pid is None or not process_alive(int(pid[0])):
                shutil.rmtree(left, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's values, or None where there is no such file or it was cut off."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
