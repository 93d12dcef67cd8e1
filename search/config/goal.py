"""Reads the goal of a study: one quantity that is maximized or minimized, and what others must reach."""

from __future__ import annotations

import math
import re
from typing import Any, Self

from pydantic import field_validator, model_validator

from search.config.section import Section
from search.config.spelling import nearest

MAXIMIZED, MINIMIZED = ("score", "perf_norm", "speed_norm"), ("time_per_token", "size")
BOUNDED = ("perf_norm", "speed_norm")
BOUND = re.compile(r">=\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")
EXAMPLE = '{minimize: size, perf_norm: ">= 0.97"}'
ELSEWHERE = {  # what people write as a bound, and where it goes
    "size": "a largest size is limits.max_size_mb",
    "time_per_token": "bound the time by speed_norm, which is 1 − time per token / the base model's",
    "score": "bound perf_norm or speed_norm",
}
MOST_PERF_NORM = 2.0  # a bound above it is a percentage


class GoalSection(Section):
    """GoalSection holds what a study searches for; the Score is maximized where nothing is named."""

    maximize: str | None = None
    minimize: str | None = None
    perf_norm: str | None = None  # the bound, as in ">= 0.97"
    speed_norm: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError(f"must hold keys, as in goal: {EXAMPLE}")
        for key, where in ELSEWHERE.items():
            if values.get(key) is not None:
                raise ValueError(f"{key} takes no bound here: {where}")
        if values.get("maximize") is None and values.get("minimize") is None:
            return {**values, "maximize": "score"}
        return values

    @field_validator("maximize", "minimize", mode="before")
    @classmethod
    def _quantity(cls, value: Any, info: Any) -> Any:
        allowed, others = (MAXIMIZED, MINIMIZED) if info.field_name == "maximize" else (MINIMIZED, MAXIMIZED)
        if value is None or value in allowed:
            return value
        if value in others:
            better, other = ("smaller", "minimize") if info.field_name == "maximize" else ("larger", "maximize")
            raise ValueError(f"{value} is better when it is {better}; write {other}: {value}")
        raise ValueError(f"is not one of {', '.join(allowed)}{nearest(str(value), allowed)}")

    @field_validator(*BOUNDED, mode="before")
    @classmethod
    def _bound(cls, value: Any, info: Any) -> Any:
        if value is None:
            return None
        found = BOUND.fullmatch(value.strip()) if isinstance(value, str) else None
        if found is None:
            raise ValueError('is no bound; write it as ">= 0.97", a share of the base model\'s')
        least = float(found[1])
        if info.field_name == "perf_norm" and not 0 < least <= MOST_PERF_NORM:
            raise ValueError(f"must be above 0 and at most {MOST_PERF_NORM:g}; the base model's PerfNorm is 1")
        if info.field_name == "speed_norm" and not (math.isfinite(least) and least < 1):
            raise ValueError("must be below 1; the base model's SpeedNorm is 0, that of a model in half its time 0.5")
        return f">= {least:g}"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.maximize is not None and self.minimize is not None:
            raise ValueError(
                f"names both maximize: {self.maximize} and minimize: {self.minimize}; keep one, and set the other to "
                "null where another file names it"
            )
        same = {"time_per_token": "speed_norm"}.get(self.objective, self.objective)
        if same in self.bounds:
            raise ValueError(f"{same} can't be bounded, since {self.objective} is what the goal is; bound another")
        return self

    @property
    def objective(self) -> str:
        """Return the quantity that is maximized or minimized."""
        return self.maximize or self.minimize or "score"

    @property
    def bounds(self) -> dict[str, float]:
        """Return the least value that each bounded quantity must have."""
        texts = {name: getattr(self, name) for name in BOUNDED}
        return {name: float(text.removeprefix(">=")) for name, text in texts.items() if text is not None}
