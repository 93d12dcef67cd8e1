"""Reads dataclasses out of JSON that another version of this program may have written.

A key that this version doesn't know is left out; an optional one that is missing gets its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compressors.plan import CompressionPlan
from evaluator.measurement import Measurement, TaskResult, Workload


def known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `values` that are fields of the dataclass `cls`."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in names}


def plan_from(values: Mapping[str, Any]) -> CompressionPlan:
    """Return the plan in `values`. Raises TypeError when a dimension is missing."""
    return CompressionPlan(**known_fields(CompressionPlan, values))


def measurement_from(values: Mapping[str, Any]) -> Measurement:
    """Return the measurement in `values`. Raises KeyError or TypeError when something required is missing."""
    tasks = values.get("tasks") or {}
    return Measurement.from_dict(
        {
            **known_fields(Measurement, values),
            "workload": known_fields(Workload, values["workload"]),
            "tasks": {name: known_fields(TaskResult, task) for name, task in tasks.items()},
        }
    )
