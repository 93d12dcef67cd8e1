"""Open regular files alone: a FIFO would block, and a device may never end."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

from readers.errors import ReadError

KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
}


def kind_of(mode: int) -> str | None:
    """Return what a file is by its `st_mode`, such as "a FIFO"; None for a regular file."""
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "no regular file")


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open a regular file for reading, without waiting for a writer.

    Args:
        path: The file.
        follow: Whether the file may be a symbolic link.

    Raises:
        ReadError: When it is no regular file, or a link that is not to be followed.
        OSError: When it is missing or can't be opened.
    """
    try:
        _require_regular(path.stat(follow_symlinks=follow).st_mode)  # before opening, which can act on a device
        nofollow = 0 if follow else os.O_NOFOLLOW
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | nofollow)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ReadError("it is a symbolic link that leads to no file") from None
        raise
    except ReadError:
        raise
    except ValueError:
        raise ReadError("its name holds a null byte") from None
    file = os.fdopen(descriptor, "rb")
    try:
        _require_regular(os.fstat(descriptor).st_mode)  # again: it may have been replaced in between
    except ReadError:
        file.close()
        raise
    return file


def _require_regular(mode: int) -> None:
    kind = kind_of(mode)
    if kind is not None:
        raise ReadError(f"it is {kind}, and only regular files are read")


def read_bytes(path: Path, most: int, *, follow: bool = True) -> bytes:
    """Return the bytes of a regular file of at most `most` bytes.

    Raises:
        ReadError: When it is larger, or `open_regular` refuses it.
        OSError: When it is missing or can't be read.
    """
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1) if size <= most else b""  # some files of /proc have no size
    if size > most or len(data) > most:
        raise ReadError(f"it holds {in_words(max(size, len(data)))}, and at most {in_words(most)} are read")
    return data


def read_text(path: Path, most: int, *, follow: bool = True) -> str:
    """Return the text of a regular UTF-8 file of at most `most` bytes, without a byte order mark.

    Raises:
        ReadError: When it is larger, is not UTF-8, or `open_regular` refuses it.
        OSError: When it is missing or can't be read.
    """
    try:
        return read_bytes(path, most, follow=follow).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ReadError("it is not UTF-8") from None


def copy(source: Path, to: Path) -> None:
    """Copy the bytes of a regular file to the new file `to`; a symbolic link is not followed.

    Raises:
        ReadError: When `source` is no regular file.
        OSError: When it can't be read, or `to` exists or can't be written.
    """
    with open_regular(source, follow=False) as reader, to.open("xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


def in_words(size: int) -> str:
    """Return a number of bytes in words, such as "1.5 MB"."""
    for unit, bytes_each in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= bytes_each:
            return f"{size / bytes_each:.1f} {unit}"
    return f"{size} bytes"
