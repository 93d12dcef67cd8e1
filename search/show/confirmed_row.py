"""Defines a confirmed trial, as a study's storage and the model's own files hold it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from compressors.plan import CompressionPlan
from evaluator.score import Score
from search.json_values import known_fields
from search.setup.goal import Goal, Known


@dataclasses.dataclass(frozen=True)
class ConfirmedRow:
    """ConfirmedRow holds the confirmed numbers of a trial; those of a trial that failed are None.

    Attributes:
        trial: The trial's number.
        plan: Its plan.
        key: Names all that the numbers depend on but the plan.
        pairs: The number of pairs of fresh engine processes that count; 0 where nothing was timed.
        taken: The number of pairs that were timed, with those that a slow process spoilt.
        text: The text that quality is computed on.
        size: The size of its weights over the base model's.
        of_goal: What it has of a goal that is not the Score alone, with the bounds.
        score_half: Half of the width of the Score's 95% interval.
        verdict: BETTER, SAME, WORSE or UNDECIDED, of the Score against the base model's.
        says: The verdict with its numbers, and what would decide it.
        speed_verdict: FASTER, SAME, SLOWER or UNDECIDED; None where nothing was timed.
        speed_says: The same with its numbers.
        bounds_verdict: HOLDS, MISSES or UNDECIDED, of the goal's bounds together; None where it has none.
        bounds_says: The verdict on each bound with its numbers.
        server: The arguments of the engine's server that were set.
        notes: Remarks, such as which pairs were replaced.
        failure: The kind of error of a trial that could not be confirmed.
        reason: The error in one line.
    """

    trial: int
    plan: CompressionPlan
    key: str
    pairs: int = 0
    taken: int = 0
    text: str | None = None
    perplexity: float | None = None
    base_perplexity: float | None = None
    size: float | None = None
    of_goal: str | None = None
    time_per_token_ms: float | None = None
    base_time_per_token_ms: float | None = None
    perf_norm: float | None = None
    perf_norm_se: float | None = None
    speed_norm: float | None = None
    speed_norm_se: float | None = None
    score: float | None = None
    score_se: float | None = None
    score_half: float | None = None
    verdict: str | None = None
    says: str | None = None
    speed_verdict: str | None = None
    speed_says: str | None = None
    bounds_verdict: str | None = None
    bounds_says: str | None = None
    server: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failure: str | None = None
    reason: str | None = None

    @property
    def known(self) -> Known:
        """What a goal asks of a model; NaN is what is not known."""
        numbers = {field.name: getattr(self, field.name) for field in dataclasses.fields(Score)}
        score = Score(**{name: math.nan if value is None else value for name, value in numbers.items()})
        return Known(score, math.nan if self.size is None else self.size)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values without those that are None."""
        values = {**dataclasses.asdict(self), "plan": self.plan.to_dict(), "notes": list(self.notes)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConfirmedRow:
        """Return the row in `values`. Raises KeyError or TypeError when something required is missing."""
        found = known_fields(cls, values)
        notes = tuple(values.get("notes", ()))
        return cls(**{**found, "plan": CompressionPlan.from_dict(values["plan"]), "notes": notes})


def confirmed_by_goal(rows: Iterable[ConfirmedRow], goal: Goal) -> list[ConfirmedRow]:
    """Return the rows from the best on: what misses the goal's bounds comes after what reaches them, failures last."""

    def place(row: ConfirmedRow) -> tuple[bool, bool, float, int]:
        if row.score is None:
            return True, True, 0.0, row.trial
        return False, not goal.reaches(row.known), -goal.value(row.known), row.trial

    return sorted(rows, key=place)
