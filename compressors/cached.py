"""Read cached files with a check, and make those again that are missing or damaged.

`kept` and `known` are the way to every file that is computed once and read later. A damaged file is removed under a
lock, one line is logged, and its maker is called. New files hold digests; files without one are read too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import secrets
import shutil
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from compressors.errors import MachineError
from compressors.files import alone, digest_of_json, written_whole

T = TypeVar("T")

LOG = logging.getLogger(__name__)
DIGEST = "sha256"  # the key of a file's digest within it
MOST_BYTES = 1 << 29  # of a JSON file
DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
    SafetensorError,
    struct.error,
)
NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.ESTALE)  # the file may well be whole


def known(path: Path, read: Callable[[Path], T], *, held: bool = False, tree: bool = False) -> T | None:
    """Return what `read` makes of the file `path`; None when there is none, or a damaged one, which is removed.

    Args:
        path: The file.
        read: A function that reads the file; what it raises is what is wrong with the file.
        held: Whether the caller holds `alone(path)`.
        tree: Whether `path` is a directory, which is deleted when it is damaged.

    Raises:
        MachineError: When a damaged file can't be removed.
    """
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DAMAGE as error:
        _require_fault_of_file(path, error)
        if held:
            drop(path, error, tree=tree)
            return None
    with alone(path):  # another process may have removed it and made it again meanwhile
        return known(path, read, held=True, tree=tree)


def kept(
    path: Path,
    read: Callable[[Path], T],
    make: Callable[[Path], object],
    waiting: Callable[[], None] = lambda: None,
    *,
    lock: Path | None = None,
    tree: bool = False,
) -> T:
    """Return what `read` makes of the file `path`, after `make` has written it if it was missing or damaged.

    One process at a time makes it; the others wait and read it.

    Args:
        path: The file.
        read: A function that reads the file; what it raises is what is wrong with the file.
        make: A function that writes the file.
        waiting: A function that is called once if another process makes it.
        lock: The path to hold `alone` instead of `path`, where several files are made one at a time.
        tree: Whether `path` is a directory, which is deleted when it is damaged.

    Raises:
        MachineError: When the file can't be removed, written or read.
    """
    with contextlib.suppress(*DAMAGE):  # what is wrong is found again under the lock
        return read(path)
    with alone(lock or path, waiting):
        value = known(path, read, held=True, tree=tree)
        if value is not None:
            return value
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
        except OSError as error:
            raise MachineError(f"{path}: can't be written ({error.strerror or error}); free some space") from None
        try:
            return read(path)
        except DAMAGE as error:
            raise MachineError(
                f"{path}: was written, and can't be read again ({reason_of(error)}); see whether the disk is sound"
            ) from None


def drop(path: Path, error: BaseException, *, tree: bool = False) -> None:
    """Remove a damaged file and log it in a line; a directory is moved to `.NAME.damaged-` and 8 digits.

    With `tree` a directory is deleted.

    The caller holds a lock, so that no whole file of another process is removed.

    Raises:
        MachineError: When it can't be removed.
    """
    reason = reason_of(error)
    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            aside = path.with_name(f".{path.name}.damaged-{secrets.token_hex(4)}")
            path.replace(aside)
            if tree:
                shutil.rmtree(aside, ignore_errors=True)
            else:
                reason = f"{reason}; moved to {aside.name}"
        else:
            path.unlink()
    except FileNotFoundError:
        pass
    except OSError as refused:
        raise MachineError(
            f"{path}: is damaged ({reason}) and can't be removed ({refused.strerror or refused}); remove it, and it is "
            "made again"
        ) from None
    tell(path, reason)


def tell(path: Path, reason: str) -> None:
    """Log that a damaged file is made again."""
    LOG.warning("%s: is damaged (%s); it is made again", path, reason)


def reason_of(error: BaseException) -> str:
    """Return what is wrong with a file, in at most 160 characters of one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"it has no {error.args[0] if error.args else 'such entry'}"
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


def _require_fault_of_file(path: Path, error: BaseException) -> None:
    """Raise what is no fault of the file itself, such as too many open files."""
    if isinstance(error, MachineError):
        raise error
    if isinstance(error, OSError) and error.errno in NOT_THE_FILE:
        raise MachineError(f"{path}: can't be read ({reason_of(error)})") from None


def require_regular(path: Path) -> None:
    """Check that `path` is a file with contents, since reading a pipe or a device would never end.

    Raises:
        FileNotFoundError: When there is nothing.
        ValueError: When it is something else.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("it is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if not status.st_size:
        raise ValueError("it is empty")


# -- JSON ----------------------------------------------------------------------------------------------------


def keep_json(path: Path, values: Mapping[str, Any], *, finite: bool = True, digest: bool = True) -> None:
    """Write `values` to `path` as JSON with their digest, whole or not at all.

    Args:
        path: The file; its directory is created if needed.
        values: The values.
        finite: Whether to refuse NaN and infinity.
        digest: Whether to add the digest; not to files whose keys people and other programs know.

    Raises:
        MachineError: When the file can't be written.
        ValueError: For NaN and infinity.
    """
    plain = json.loads(json.dumps(values, allow_nan=not finite))
    own = {DIGEST: digest_of_json([path.name, plain], 32)} if digest else {}
    text = json.dumps({**values, **own}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as scratch:
            scratch.write_text(text + "\n")
    except OSError as error:
        raise MachineError(f"{path}: can't be written ({error.strerror or error}); free some space") from None


def read_json(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """Return the object in a JSON file, without its digest.

    Raises:
        FileNotFoundError: When there is none.
        OSError: When it can't be read.
        ValueError: When it holds something else, a number that is not finite, or another digest than its own.
    """
    require_regular(path)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has {path.stat().st_size / 1e6:.0f} MB")
    text = path.read_text(encoding="utf-8")
    values = json.loads(text, parse_constant=_refuse_number, parse_float=_finite) if finite else json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    digest = values.pop(DIGEST, None)
    if digest is not None and digest != digest_of_json([path.name, values], 32):
        raise ValueError("its contents are not those that were written")
    return values


def _refuse_number(text: str) -> float:
    raise ValueError(f"it holds {text}")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
