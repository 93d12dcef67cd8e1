"""Finds the Pareto front of PerfNorm and SpeedNorm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def pareto(items: Iterable[T], at: Callable[[T], tuple[float, float]]) -> list[T]:
    """Return the items that no other beats in PerfNorm without losing SpeedNorm, the highest PerfNorm first.

    Args:
        items: The items.
        at: An item's (PerfNorm, SpeedNorm).
    """
    front: list[T] = []
    fastest = -math.inf
    for item in sorted(items, key=lambda item: tuple(-value for value in at(item))):
        if at(item)[1] > fastest:
            front.append(item)
            fastest = at(item)[1]
    return front
