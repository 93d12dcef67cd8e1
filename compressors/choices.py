"""One record for each thing that can be chosen about a compressed model.

The records stand with the fields of `compressors.plan.CompressionPlan`. Whatever lists the choices is derived from
them: the sections of a study file, the options of `compress`, the canonical form of a plan, names of directories,
tables, reports and the reference pages. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any

Value = str | int
Rule = Callable[[Any, Any], bool]  # (a CompressionPlan, the base model's), which `compressors.plan` defines

DTYPES = ("float32", "float16", "bfloat16")
SCHEMES = ("W8A8", "FP8_DYNAMIC", "W4A16")  # preset schemes of compressed-tensors
PRECISIONS = DTYPES + SCHEMES


class Need(enum.Flag):
    """What a plan needs to know of the base model before it can be carried out."""

    NOTHING = 0
    ACTIVATIONS = enum.auto()  # compressors.statistics.activations
    SECOND_MOMENTS = enum.auto()  # compressors.statistics.second_moments, and the text that they are of


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way of choosing, repairing or rounding that a plan names.

    Attributes:
        values: The values that it can have, the default first. Empty for a number of 0 or more, whose default is 0.
        help: A sentence for people, for --help, the study file and the reference pages.
        meanings: What each value does, in a few words.
        methods: The methods of `compress` that take it.
        short: How names and tables show a value that is not the default; `{}` stands for the value.
        applies: Whether it makes a difference to a plan. Where it makes none, the plan is given the default.
        otherwise: Values that make a difference in fewer plans: value → (where it does, the value to take elsewhere).
        schemes: The precisions that it goes with; empty: all of them.
        refusal: Why it does not go with another precision; `{value}`, `{precision}`, `{default}` are filled in.
        needs: What a value needs to know of the base model.
    """

    values: tuple[Value, ...]
    help: str
    methods: tuple[str, ...]
    short: str
    applies: Rule
    meanings: Mapping[Value, str] = dataclasses.field(default_factory=dict)
    otherwise: Mapping[Value, tuple[Rule, Value]] = dataclasses.field(default_factory=dict)
    schemes: tuple[str, ...] = ()
    refusal: str = ""
    needs: Callable[[Value], Need] = lambda value: Need.NOTHING

    @property
    def default(self) -> Value:
        """The value of a plan that does not name one."""
        return self.values[0] if self.values else 0

    @property
    def is_number(self) -> bool:
        """Whether it is a number of 0 or more, and not one of `values`."""
        return not self.values


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A size of the model that a plan can make smaller.

    Attributes:
        key: Its name in the study file's `compression` section.
        method: The method of `compress` that cuts it.
        short: How names of directories and runs show it, before the number.
    """

    key: str
    method: str
    short: str


def choice(*values: Value, **record: Any) -> Any:
    """A dataclass field with a `Choice`; the default is the first value, or 0 where there is none."""
    made = Choice(values, **record)
    return dataclasses.field(default=made.default, metadata={"choice": made})


def needed_unless(*without: Value, need: Need = Need.SECOND_MOMENTS) -> Callable[[Value], Need]:
    """The rule that all values but these have this need."""
    return lambda value: Need.NOTHING if value in without else need
