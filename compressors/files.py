"""Write files whole or not at all, hash JSON, and hold a lock between processes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compressors.errors import MachineError


def digest_of_json(values: Any, digits: int) -> str:
    """Return the first `digits` hexadecimal digits of the sha256 of `values` as JSON with sorted keys.

    Cache keys and file names are such digests, so the text that is hashed must never change.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:digits]


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield the path of an empty scratch file next to `path`, and rename it to `path` when the block ends.

    A reader of `path` sees the old file or the new one, never a part. After an error the scratch file is removed
    and `path` is unchanged. A killed process leaves a file named `.NAME.` and eight random characters.

    Raises:
        OSError: When the directory of `path` is missing or can't be written.
    """
    scratch = _scratch_of(path)
    scratch.open("x").close()  # by hand, and not by tempfile, so that permissions follow the umask
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def scratch_directory(path: Path) -> Path:
    """Create an empty directory next to `path`, with the permissions that the umask gives; the caller removes it."""
    scratch = _scratch_of(path)
    scratch.mkdir()
    return scratch


def _scratch_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` to `path` as indented JSON, whole or not at all; create its directory if needed.

    Raises:
        ValueError: For NaN and infinity.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as scratch:
        scratch.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def alone(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock on `path` between the processes of one machine while the block runs.

    The lock is released when its holder is killed. It is the empty file `.NAME.lock` next to `path`, which is removed
    at the end; the directory of `path` is created.

    Args:
        path: The path that only one process at a time may work on.
        waiting: A function that is called once if another process holds the lock.

    Raises:
        MachineError: When the lock file can't be written.
    """
    lock = path.with_name(f".{path.name}.lock")
    held, waited = None, False
    while held is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            opened = lock.open("w")
        except OSError as error:
            raise MachineError(f"{lock}: {error.strerror or error}; make its directory writable") from None
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waited:
                waiting()
            waited = True
            fcntl.flock(opened, fcntl.LOCK_EX)
        if _is_open_file(lock, opened.fileno()):
            held = opened
        else:  # its holder has removed it, and another process may hold a new one
            opened.close()
    with held:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


def _is_open_file(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False
