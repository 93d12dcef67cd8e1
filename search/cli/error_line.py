"""Turns an error into one line for standard error, and tells exhausted memory from other errors."""

from __future__ import annotations

import errno

MOST = 2000  # characters of a line
# What the dynamic loader, the threads' and torch's allocators say; their errors are of unrelated types.
NO_MEMORY = (
    "failed to map segment",
    "cannot allocate memory",
    "can't allocate memory",
    "not enough memory",
    "can't start new thread",
    "unable to allocate",
    "failed to map file",
    "cannot create thread",
)


def line_of(error: BaseException) -> str:
    """Return the message of an error in one line of printable characters, with its middle left out if it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    if len(text) > MOST:
        text = f"{text[: MOST - 300]} … ({len(text) - MOST + 100:,} characters left out) … {text[-200:]}"
    return text


def memory_line(error: BaseException) -> str | None:
    """Return what to say where an error, or one that caused it, means that memory is exhausted; else None.

    Nothing is imported, since the next import would fail as well.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
        said = str(one)[:10_000].lower()
        if (
            isinstance(one, MemoryError)
            or getattr(one, "errno", None) == errno.ENOMEM
            or (isinstance(one, ImportError | OSError | RuntimeError) and any(text in said for text in NO_MEMORY))
        ):
            reason = line_of(one)
            return (
                f"the memory that this process may use is exhausted ({reason[:200]}); free some, or raise its limit "
                "(ulimit -v)"
            )
    return None
