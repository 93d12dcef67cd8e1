"""Writes directories atomically: next to their destination first, then renamed; deletes what killed writers left."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from readers import json_reader
from readers.errors import ReadError
from search.errors import UsageError
from search.processes import abandoned, mark

MOST_JSON = 500_000_000  # bytes; the embedded texts are the largest
CACHE = Path(os.environ.get("OPTUNA_SEARCH_CACHE", "~/.cache/optuna-search")).expanduser()


def refuse_foreign(to: Path, what: str, *sources: Path, option: str = "--save-path") -> None:
    """Refuse to write a model to a directory whose contents must not be replaced.

    Args:
        to: The directory to write.
        what: The command, for messages.
        sources: The models that are read.
        option: The option that chooses `to`, for messages.

    Raises:
        UsageError: `to` is a file, is or holds one of the sources, or holds files and no model.
    """
    place = to.resolve()
    for source in (source.resolve() for source in sources):
        if source.is_relative_to(place):
            how = "is" if source == place else "holds"
            raise UsageError(
                f"{what} to {to}: {how} the model that is read, and would be lost; choose another {option}"
            )
    for place in (to, *to.parents):
        if place.exists() and not place.is_dir():
            raise UsageError(f"{what} to {to}: {'is' if place == to else f'{place} is'} a file; name a directory")
    if to.is_dir() and any(to.iterdir()) and not (to / "config.json").is_file():
        raise UsageError(f"{what} to {to}: holds files, and they are no model; name an empty or a new directory")


@contextlib.contextmanager
def atomic_directory(to: Path, what: str) -> Iterator[Path]:
    """Yield a path next to `to`; the directory that the block creates there then replaces `to`.

    After an error the new directory is deleted, and `to` is unchanged.

    Raises:
        UsageError: The file system refuses, or `to` must not be replaced (`refuse_foreign`).
    """
    refuse_foreign(to, what)
    to = to.resolve()  # what a symbolic link leads to is replaced, on its own disk, and the link stays
    prefix = f".{to.name}.{what}-"
    scratch, old = to.with_name(f"{prefix}{mark()}"), to.with_name(f"{prefix}{mark()}-old")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        sweep(to.parent, prefix)
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


def sweep(directory: Path, prefix: str) -> None:
    """Delete the temporary files and directories of processes that were killed.

    Args:
        directory: The directory that holds them.
        prefix: What their names begin with; the number of the process follows.
    """
    for dots in ("", "."):  # files in a scratch directory are first written next to it, with another dot
        for left in directory.glob(f"{dots}{glob.escape(prefix)}*"):
            if not abandoned(left, left.name.removeprefix(dots).removeprefix(prefix)):
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None where there is none, or it is cut off or unreadable."""
    try:
        values = json_reader.read(path, most=MOST_JSON)
    except (OSError, ReadError):
        return None
    return values if isinstance(values, dict) else None
