"""TaskResult holds how right a model was on a task, and what is kept of the answers that it generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ShownAnswer:
    """An answer that a report can show: the question, what was expected, and what the model wrote."""

    question: str
    expected: str
    text: str


@dataclasses.dataclass(frozen=True)
class Answers:
    """What is kept of generated answers; `evaluator.lengths` says what each share counts.

    Attributes:
        tokens: The number of generated tokens of each answer, in the task's order.
        cut: The share of answers that reached the limit of tokens.
        empty: The share without any text.
        repeating: The share that ends in an endless cycle.
        shown: The first answers.
    """

    tokens: tuple[int, ...]
    cut: float
    empty: float
    repeating: float
    shown: tuple[ShownAnswer, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Answers:
        """Return the answers in JSON values."""
        shown = tuple(ShownAnswer(**one) for one in values["shown"])
        return cls(**{**values, "tokens": tuple(values["tokens"]), "shown": shown})


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The accuracy on a task.

    Attributes:
        value: The mean of `correct`, from 0 to 1.
        se: Its standard error.
        items: The number of items.
        correct: How correct each item was, from 0 to 1, in the task's order: two models' errors can be paired.
        digest: The digest of the items as the model read them.
        answers: The generated answers; None where the task lets a model generate nothing.
    """

    value: float
    se: float
    items: int
    correct: tuple[float, ...]
    digest: str = ""
    answers: Answers | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `answers` only where there are any."""
        values = {**dataclasses.asdict(self), "correct": list(self.correct)}
        if self.answers is None:
            del values["answers"]
        else:
            values["answers"] = {**values["answers"], "tokens": list(self.answers.tokens)}
            values["answers"]["shown"] = list(values["answers"]["shown"])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskResult:
        """Return the result that `to_dict` wrote."""
        answers = None if values.get("answers") is None else Answers.from_dict(values["answers"])
        return cls(**{**values, "correct": tuple(values["correct"]), "answers": answers})
