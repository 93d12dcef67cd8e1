"""Reads dataclasses out of JSON that another version of this program may have written.

A key that this version doesn't know is left out; an optional one that is missing gets its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compressors.plan import CompressionPlan
from compressors.typed_json import typed
from evaluator.measurement import Measurement

POSITIVE = (  # or a score would be a division by zero
    "perplexity",
    "tokens",
    "time_per_token_ms",
    "base_time_per_token_ms",
    "time_ratio",
    "tokens_per_sec",
    "model_size_mb",
)


def known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `values` that are fields of the dataclass `cls`."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in names}


def plan_from(values: Any) -> CompressionPlan:
    """Return the plan in `values`. Raises ValueError when a dimension is missing, or a value has another type."""
    return typed(CompressionPlan, values, "plan")


def measurement_from(values: Any) -> Measurement:
    """Return the measurement in `values`.

    Raises:
        ValueError: When something required is missing, has another type, or can't be true.
    """
    measured = typed(Measurement, values, "measurement")
    for name in POSITIVE:
        if getattr(measured, name) <= 0:
            raise ValueError(f"measurement.{name} is {getattr(measured, name)}, and not positive")
    if not measured.shard_nll:
        raise ValueError("measurement.shard_nll is empty")
    return measured
