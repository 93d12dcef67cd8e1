"""Holds the base of every section of a study file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Section is the base of all sections: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
