"""Defines the rows of the comparison of evaluated models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from compressors.plan import CompressionPlan
from evaluator.measurement import METRICS, OF_ANSWERS
from evaluator.score import Score

FIRST = ("total_parameters", "model_size_mb")  # whose keys come first in JSON: they are older than the records
COMPARED = (*FIRST, *(name for name, metric in METRICS.items() if metric.column is not None and name not in FIRST))


@dataclasses.dataclass(frozen=True)
class Result:
    """Result holds what was measured of one model.

    Attributes:
        plan: The plan that made the model; None for a model of another origin.
        metrics: The metrics of `COMPARED`, by name; None where one was not computed.
        score: PerfNorm, SpeedNorm and Score with their standard errors.
        timed: Whether the times were measured; if not, they are predicted.
    """

    plan: CompressionPlan | None
    metrics: Mapping[str, float | None]
    score: Score
    timed: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the metrics and the numbers of the score stand next to the plan."""
        metrics = {name: value for name, value in self.metrics.items() if value is not None or name not in OF_ANSWERS}
        return {
            "plan": None if self.plan is None else self.plan.to_dict(),
            **metrics,
            **dataclasses.asdict(self.score),
        }


@dataclasses.dataclass(frozen=True)
class Row:
    """A row holds one model of a comparison: its result, or why there is none.

    Attributes:
        path: The model's directory, or the source of the base model.
        result: None for a model that could not be built or measured.
        failure: The kind of error, where there is no result.
        reason: The error in one line, where there is no result.
        before: Whether an earlier call measured it; None where that was not asked.
        remark: What keeps it from being compared with the first row.
    """

    name: str
    path: str
    result: Result | None = None
    failure: str | None = None
    reason: str | None = None
    before: bool | None = None
    remark: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values without the keys that don't apply."""
        named = {"name": self.name, "path": self.path}
        if self.result is None:
            return {**named, "failure": self.failure, "reason": self.reason}
        notes = {"before": self.before, "remark": self.remark}
        return {**named, **self.result.to_dict(), **{key: note for key, note in notes.items() if note is not None}}


def by_score(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with the best Score first and those without a result last."""
    return sorted(rows, key=lambda row: 1.0 if row.result is None else -row.result.score.score)
