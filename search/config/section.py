"""Holds the base of every section of a study file."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Section is the base of all sections: frozen, without unknown keys, and without inf and nan."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def list_of_one(value: Any) -> Any:
    """Read a value where a list is expected as a list of one."""
    return [value] if isinstance(value, str | int) else value
