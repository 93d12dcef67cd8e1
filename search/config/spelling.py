"""Refuses unknown names with the nearest known spelling."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


def nearest(word: str, choices: Sequence[str]) -> str:
    """Return a hint that names the nearest of `choices`, or "" where none is near."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def require_known(names: list[Any] | None, allowed: Sequence[Any]) -> None:
    """Check that all names are allowed.

    Raises:
        ValueError: One is not; the message lists the allowed names and the nearest one.
    """
    for name in names or ():
        if name not in allowed:
            hint = nearest(name, [str(value) for value in allowed]) if isinstance(name, str) else ""
            raise ValueError(f"{name!r} is not one of {', '.join(map(str, allowed))}{hint}")
