"""Defines `text`, the section of the study file that names the texts, and how they are cut."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from search.config.section import Section, list_of_one

EMBEDDED, SELF = "embedded", "self"  # the text that CPython ships; text that the base model writes
Weights = Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]  # how much each text counts
Texts = list[str] | Weights | Literal["embedded"]


def _weights(value: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a mapping of texts to weights. Raises ValueError for what is no weight."""
    wrong = [
        f"{name} has {weight}"
        for name, weight in value.items()
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 < weight < math.inf
    ]
    if wrong or not value:
        raise ValueError(f"a mapping gives each text a weight above 0, and {', '.join(wrong) or 'this one is empty'}")
    return dict(value)


class Text(Section):
    """Text names the texts: `embedded` (prose that CPython ships), .txt and .jsonl files, hub:ORGANISATION/NAME.

    The calibration text can also be `self`, which the base model writes, and a list of all of these. A mapping gives
    each text a weight; texts of a list weigh the same.
    """

    calibration: list[str] | Weights | Literal["embedded", "self"] = [EMBEDDED, SELF]
    search: Texts = "embedded"
    report: Texts | None = "embedded"  # text that no search saw, for confirmation; null: none
    window: Annotated[int, Field(ge=16)] = 256  # tokens
    calibration_windows: Annotated[int, Field(ge=1)] = 16
    moments_windows: Annotated[int, Field(ge=1)] | None = None  # for each domain, where `build.needs_moments`
    shards: Annotated[int, Field(ge=2)] = 16
    windows_per_shard: Annotated[int, Field(ge=1)] = 1
    prompts: str | None = None  # a file of requests that a workload of kind batch or serve times; null: random ids
    chat_template_kwargs: dict[str, Any] = {}  # arguments of the chat template for those of them that are chats

    @field_validator("calibration", "search", "report", mode="before")
    @classmethod
    def _lists(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Mapping):
            return _weights(value)
        alone = value == EMBEDDED or (value == SELF and info.field_name == "calibration")
        return value if alone else list_of_one(value)

    @property
    def calibration_names(self) -> list[str]:
        """The parts of the calibration text."""
        return [self.calibration] if isinstance(self.calibration, str) else list(self.calibration)

    @property
    def writes_beside(self) -> bool:
        """Whether the base model writes a part of the calibration text, beside others."""
        return SELF in self.calibration_names and set(self.calibration_names) != {SELF}

    @field_validator("search", "report")
    @classmethod
    def _judges(cls, value: Any) -> Any:
        named = [value] if isinstance(value, str) else value or []
        if SELF in named or (EMBEDDED in named and not isinstance(value, str)):
            raise ValueError(f"{SELF} and mixes with {EMBEDDED} are of text.calibration alone; name files")
        return value
