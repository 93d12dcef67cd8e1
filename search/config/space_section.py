"""Defines `space`, the section of the study file that says what is searched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, create_model, field_validator, model_validator

from compressors.choices import PRECISIONS, Choice
from compressors.plan import CHOICES, DIMENSIONS
from search.config.section import Section, list_of_one
from search.config.spelling import require_known


class Range(Section):
    """Range holds the integers from `low` to `high`, both included. It may change when a study is resumed."""

    low: Annotated[int, Field(ge=1)]
    high: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        if (self.high - self.low) % self.step:
            raise ValueError(f"high ({self.high}) must be low ({self.low}) plus a multiple of step ({self.step})")
        return self


def _range_of_text(value: Any) -> Any:
    """Read `9..12` as {low: 9, high: 12}, which needs no quotes in a shell."""
    low, dots, high = value.partition("..") if isinstance(value, str) else ("", "", "")
    return {"low": low, "high": high} if dots else value


Dimension = Range | Annotated[int, Field(ge=1)] | None  # searched | fixed | as in the base model


NUMBERS = [name for name, record in CHOICES.items() if record.is_number]
LISTED = {name: record for name, record in CHOICES.items() if not record.is_number}  # choices with names for values


class SpaceSizes(Section):
    """SpaceSizes holds the searched sizes and precisions; `compressors.plan.CHOICES` are added to it."""

    num_hidden_layers: Dimension = None
    num_attention_heads: Dimension = None
    num_key_value_heads: Dimension = None
    hidden_size: Dimension = None
    intermediate_size: Dimension = None
    precision: list[str] | None = None  # None: as in the base model

    @field_validator(*DIMENSIONS, *NUMBERS, mode="before", check_fields=False)
    @classmethod
    def _ranges(cls, value: Any) -> Any:
        return _range_of_text(value)

    @field_validator("precision", *LISTED, mode="before", check_fields=False)
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return list_of_one(value)

    @field_validator("precision", *LISTED, check_fields=False)
    @classmethod
    def _known(cls, names: list[Any] | None, info: Any) -> list[Any] | None:
        require_known(names, PRECISIONS if info.field_name == "precision" else CHOICES[info.field_name].values)
        if names is not None and (not names or len(set(names)) != len(names)):
            raise ValueError("needs at least one value, and none twice")
        return names


def _searched(record: Choice) -> tuple[Any, Any]:
    """Return the type and the default of a choice in `space`."""
    if record.is_number:
        return Range | Annotated[int, Field(ge=0)], record.default
    return list[type(record.default)], [record.default]  # type: ignore[misc]


if TYPE_CHECKING:

    class Space(SpaceSizes):
        """Space holds what is searched: sizes, precisions and choices."""

        def __getattr__(self, name: str) -> Any: ...

else:
    Space = create_model("Space", __base__=SpaceSizes, **{name: _searched(record) for name, record in CHOICES.items()})
