"""Define the error of this package; its message is a reason that fits behind a file's name."""

from __future__ import annotations


class ReadError(ValueError):
    """ReadError says why a file can't be read, in a clause such as "it is a FIFO, and only regular files are read"."""
