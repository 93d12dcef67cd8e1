"""What a study searches for, as pure functions of what is known of a plan.

A trial's value is what its goal maximizes, so that larger is better whatever the goal is:

    score                           Score
    perf_norm                       PerfNorm
    speed_norm or time_per_token    SpeedNorm = 1 − time per token / the base model's
    size                            1 − size / the base model's

A bound is a constraint: `bound − value`, which is 0 or less where it holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from evaluator.score import Score
from search.config.goal import MINIMIZED, GoalSection

SURE = 2.0  # standard errors from its forecast that a plan is given a chance of
SAME_SIZE = 1e-4  # of the base model's size: the headers of two files with the same weights differ by less


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least value that a quantity, perf_norm or speed_norm, must have."""

    quantity: str
    least: float


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a plan, measured or forecast.

    Attributes:
        score: PerfNorm, SpeedNorm and Score with their standard errors; inf for one of which nothing is known.
        size: The size over the base model's.
    """

    score: Score
    size: float = math.nan

    def of(self, quantity: str) -> tuple[float, float]:
        """Return a quantity as larger is better, and its standard error."""
        if quantity == "size":
            return 1.0 - self.size, 0.0
        name = "speed_norm" if quantity == "time_per_token" else quantity
        return getattr(self.score, name), getattr(self.score, f"{name}_se")

    def without_forecast(self) -> Known:
        """Return the size alone: nothing is known of the rest."""
        errors = dict.fromkeys(("perf_norm_se", "speed_norm_se", "score_se"), math.inf)
        return dataclasses.replace(self, score=dataclasses.replace(self.score, **errors))


@dataclasses.dataclass(frozen=True)
class Goal:
    """A quantity to optimize, and bounds that others must reach.

    Attributes:
        objective: The quantity: score, perf_norm, speed_norm, time_per_token or size.
        bounds: The bounds.
    """

    objective: str = "score"
    bounds: tuple[Bound, ...] = ()

    @classmethod
    def of(cls, section: GoalSection) -> Goal:
        """Return the goal that a study file states."""
        return cls(section.objective, tuple(Bound(*bound) for bound in section.bounds.items()))

    @classmethod
    def stored(cls, file: Mapping[str, Any]) -> Goal:
        """Return the goal of a study whose file was stored as JSON, perhaps before there were goals."""
        return cls.of(GoalSection.model_validate(file.get("goal", {})))

    def __str__(self) -> str:
        """Say the goal as people write it: minimize size, perf_norm >= 0.97."""
        verb = "minimize" if self.objective in MINIMIZED else "maximize"
        bounds = [f"{bound.quantity} >= {bound.least:g}" for bound in self.bounds]
        return ", ".join([f"{verb} {self.objective}", *bounds])

    @property
    def is_score(self) -> bool:
        """Whether the Score is the value of a trial."""
        return self.objective == "score"

    @property
    def is_default(self) -> bool:
        """Whether the Score is maximized and nothing is bounded."""
        return self == Goal()

    @property
    def metric(self) -> str:
        """Return the name of a trial's value in the study's storage."""
        return {"time_per_token": "speed_norm", "size": "size_saved"}.get(self.objective, self.objective)

    @property
    def by_text(self) -> bool:
        """Whether the screen's shards say which of two plans is better."""
        return self.objective in ("score", "perf_norm")

    def bound(self, quantity: str) -> float | None:
        """Return the least value that a quantity must have; None: it is free."""
        return next((bound.least for bound in self.bounds if bound.quantity == quantity), None)

    def value(self, known: Known) -> float:
        """Return the value of a trial."""
        return known.of(self.objective)[0]

    def value_se(self, known: Known) -> float:
        """Return the standard error of `value`; a size has none."""
        return known.of(self.objective)[1]

    def constraints(self, known: Known) -> dict[str, float]:
        """Return bound − value of each bounded quantity."""
        return {bound.quantity: bound.least - known.of(bound.quantity)[0] for bound in self.bounds}

    def is_told(self, known: Known) -> bool:
        """Return whether anything is known of what is optimized or bounded."""
        names = [self.objective, *(bound.quantity for bound in self.bounds)]
        return any(math.isfinite(known.of(name)[1]) for name in names)

    def reaches(self, known: Known) -> bool:
        """Return whether all bounds are reached."""
        return all(value <= 0 for value in self.constraints(known).values())

    def broken(self, known: Known) -> Bound | None:
        """Return the first bound that the plan surely misses, by SURE standard errors; None where none is."""
        for bound in self.bounds:
            mean, error = known.of(bound.quantity)
            if mean + SURE * error < bound.least:
                return bound
        return None

    def can_beat(self, known: Known, best: float) -> bool:
        """Return whether the plan may reach a value: within SURE standard errors; a size has to be below it."""
        value, error = known.of(self.objective)
        if self.objective == "size":
            return value > best + SAME_SIZE
        return not value + SURE * error < best

    def lost_above(self, best: float | None, perf_norm: float | None, weights: tuple[float, float]) -> float | None:
        """Return the time ratio above which a plan has lost to the best, or misses its bound; None: there is none.

        Args:
            best: The best feasible trial's value; None without one.
            perf_norm: The plan's PerfNorm; None where it is not known.
            weights: The weights of PerfNorm and SpeedNorm in the Score.
        """
        limits = []
        least = self.bound("speed_norm")
        if least is not None:
            limits.append(1.0 - least)
        if best is not None and self.objective in ("speed_norm", "time_per_token"):
            limits.append(1.0 - best)
        if best is not None and self.is_score and perf_norm is not None and weights[1]:
            limits.append(1.0 - (best - weights[0] * perf_norm) / weights[1])
        return min(limits, default=None)

    def wants_time(self, weight_speed: float) -> bool:
        """Return whether times decide anything, where SpeedNorm has this weight in the Score."""
        return self._asks_for_time or (self.is_score and weight_speed > 0)

    @property
    def _asks_for_time(self) -> bool:
        """Whether a time is optimized or bounded by itself."""
        return self.objective in ("speed_norm", "time_per_token") or self.bound("speed_norm") is not None

    def time_ratio_se(self, wanted: float, weight_speed: float) -> float:
        """Return the standard error of the time ratio that is small enough where the value's should be `wanted`.

        Where times decide nothing, and are only told, any is: the first round of turns.

        Args:
            wanted: The standard error of the value; 0: as small as all turns make it.
            weight_speed: The weight of SpeedNorm in the Score.
        """
        if wanted and not self.wants_time(weight_speed):
            return math.inf
        by_score = wanted / weight_speed if self.is_score and weight_speed else wanted
        return min(wanted, by_score) if self._asks_for_time else by_score
