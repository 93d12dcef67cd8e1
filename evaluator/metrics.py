"""Metric holds what people are shown of one number of a measurement.

A new number is one field of `evaluator.measurement.Measurement` with such a record. The attributes of a trial, MLflow's
names, `status`, the tables and the report follow from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

COUNT = "count"  # the format of a large count: 1.28B, 134.5M
UNKNOWN = "–"
METRIC = "metric"  # the key of a field's metadata
SCORE_COLUMN = 50  # the place of PerfNorm, SpeedNorm and Score among the columns

Output = Literal["column", "front", "row", "note"]


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
        written = short_count(value) if self.format == COUNT else f"{value:{self.format}}"
        return f"{written} ± {error:{self.format}}" if self.with_error and error is not None else written

    def text_of(self, values: object, name: str) -> str:
        """Return the text of the metric `name`, which is an attribute of `values`, as is its standard error if any."""
        return self.text(getattr(values, name), getattr(values, f"{name}_se", None))


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of a measurement, and where it is shown.

    Attributes:
        unit: The unit; empty for a ratio or a count.
        better: Which values are better; None where neither is.
        base: The base model's value where it follows from the definition, else None.
        attribute: Whether a trial has it as a user attribute.
        status: Whether the JSON of `status` has it. That is read from a trial's attributes, so it has to be one.
        mlflow: Whether MLflow has it as a metric, as a parameter, or not at all. Trials are read from the storage: a
            trial has it in MLflow only where it is an attribute too.
        column: The column in the comparison of models, or None. The JSON of a comparison has it too then.
        front: The column in the table of a study's Pareto front, or None. It is one of `status` then.
        row: The row in the report of a model, or None.
        note: The row in the note of a trial in optuna-dashboard, or None. The unit follows the value.
        timed: Whether it comes from the timing: where nothing was timed, people read "predicted" in its place.
        optional: Whether it is left out everywhere where it is None: what nobody asked for is not shown.

    Raises:
        ValueError: It is to be shown where it can't be read from.
    """

    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    base: float | None = None
    attribute: bool = False
    status: bool = False
    mlflow: Literal["metric", "parameter"] | None = None
    column: Shown | None = None
    front: Shown | None = None
    row: Shown | None = None
    note: Shown | None = None
    timed: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        if (self.status and not self.attribute) or (self.front is not None and not self.status):
            raise ValueError("metric: status needs attribute, and front needs status")

    @property
    def base_text(self) -> str | None:
        """The base model's value as people read it, where it follows from the definition."""
        return None if self.base is None else f"{self.base:g}"

    def with_unit(self, text: str) -> str:
        """Return the text of a value with the unit after it."""
        return f"{text} {self.unit}" if self.unit else text


def shown(metrics: Mapping[str, Metric], output: Output) -> dict[str, Shown]:
    """Return the metrics that one kind of output has, by name and in the order of their places there."""
    found = {name: getattr(metric, output) for name, metric in metrics.items()}
    return dict(sorted(((name, one) for name, one in found.items() if one), key=lambda pair: pair[1].place))


def short_count(value: float) -> str:
    """Return a large count in short, such as `1.28B` or `134.5M`."""
    return f"{value / 1e9:.2f}B" if value >= 1e9 else f"{value / 1e6:.1f}M"
