"""Files that appear whole or not at all, and a lock between processes that make the same one."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compressors.errors import CheckpointError


def digest_of_json(values: Any, digits: int) -> str:
    """Return the first `digits` hexadecimal digits of the sha256 of `values` as JSON with sorted keys.

    Cache keys and file names are such digests, so the text that is hashed must never change.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:digits]


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Its directory is made if it isn't there. Raises ValueError for NaN and infinity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as out:
        json.dump(values, out, indent=1, allow_nan=False)
        out.write("\n")
    Path(out.name).chmod(0o644)
    Path(out.name).replace(path)


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
