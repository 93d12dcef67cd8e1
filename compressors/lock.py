"""One process at a time makes a file or directory that several may want; the others wait, and find it made."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

from compressors.errors import CheckpointError


@contextlib.contextmanager
def alone(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While the block runs, no other process is in a block of the same `path`, on this machine; a killed one is not.

    The directory of `path` is made. waiting: called where another process has to be waited for.
    `.NAME.lock` beside `path`, which is empty, stays there. Raises CheckpointError where it can't be written.
    """
    place = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = place.open("w")
    except OSError as error:
        raise CheckpointError(f"{place}: {error.strerror or error}; make its directory writable") from None
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
