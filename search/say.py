"""The callback that is told, in a few words for people, what is being done."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]


def silent(text: str) -> None:
    """Tell nobody."""
