"""Metric holds what people are shown of one number of a measurement.

A new number is one field of `evaluator.measurement.Measurement` with such a record. The attributes of a trial, MLflow's
names, `status`, the tables and the report follow from it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

COUNT = "count"  # the format of a large count: 1.28B, 134.5M
UNKNOWN = "–"
METRIC = "metric"  # the key of a field's metadata
SCORE_COLUMN = 50  # the place of PerfNorm, SpeedNorm and Score among the columns


@dataclasses.dataclass(frozen=True)
class Shown:
    """How a metric is written in one kind of output.

    Attributes:
        title: The heading of its column or the name of its row.
        place: The place among the others: the lowest comes first.
        format: A format specification, or COUNT.
        with_error: Whether the standard error follows; it is the field with `_se` after the metric's name.
    """

    title: str
    place: int
    format: str
    with_error: bool = False

    def text(self, value: float | None, error: float | None = None) -> str:
        """Return a value, and its standard error if there is one, as people read it."""
        if value is None:
            return UNKNOWN
        written = _count(value) if self.format == COUNT else f"{value:{self.format}}"
        return f"{written} ± {error:{self.format}}" if self.with_error and error is not None else written


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of a measurement, and where it is shown.

    Attributes:
        unit: The unit; empty for a ratio or a count.
        better: Which values are better; None where neither is.
        base: The base model's value where it follows from the definition, else None.
        attribute: Whether a trial has it as a user attribute.
        status: Whether `status` has it.
        mlflow: Whether MLflow has it as a metric, as a parameter, or not at all.
        column: The column in tables of models, or None.
        row: The row in the report of a model, or None.
    """

    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    base: float | None = None
    attribute: bool = False
    status: bool = False
    mlflow: Literal["metric", "parameter"] | None = None
    column: Shown | None = None
    row: Shown | None = None


def _count(value: float) -> str:
    return f"{value / 1e9:.2f}B" if value >= 1e9 else f"{value / 1e6:.1f}M"
