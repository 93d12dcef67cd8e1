"""Tasks that a model is asked as a part of Perf, one kind a file. The file's name is the kind's in a study file.

A new kind is one file here and one test. The file offers these names and imports neither torch nor lm_eval at module
level, because reading a study file imports it:

    Section(tasks.Section)            the keys that this kind takes in a study file, and what it refuses
    load(section, tokenizer) -> Task  reads local files, checks them and tokenizes them

Every key has a default, and kinds that share a key give it one type: together they are the keys of `evaluation.perf`.
`Kind` is this list as a protocol. A task knows no model: it hands windows of token ids to whatever has `nll` and
decides by the likelihoods, or hands prompts to whatever has `generate` and judges the answers.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import pkgutil
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol, cast

from pydantic import BaseModel, ConfigDict, Field

from evaluator.errors import EvaluationError
from evaluator.generation import Answer, Limits
from evaluator.score import standard_error
from evaluator.task_result import Answers, TaskResult

__all__ = [
    "AskedEngine",
    "GeneratingEngine",
    "Kind",
    "Look",
    "NllEngine",
    "Section",
    "Task",
    "TaskResult",
    "digest_of",
    "load",
    "module_of",
    "names",
    "result_of",
]

Progress = Callable[[str], None] | None  # told what is being done
Look = Callable[[Sequence[float]], None] | None  # sees how correct the first items were, and may raise to end the task


class Section(BaseModel):
    """Keys that every kind of task takes in a study file.

    Attributes:
        weight: The task's weight in Perf.
        name: The task's name in tables; by default its first file's, or the task's own.
        limit: The number of items to ask, from the first; None means all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    weight: Annotated[float, Field(gt=0)] = 1.0
    name: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class NllEngine(Protocol):
    """What a task needs of an engine: `EngineProcess`, or a model in memory behind the same method."""

    def nll(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the negative log-likelihood of each token except the first, in nats.

        A window of T token ids gives T − 1 numbers.
        """


class GeneratingEngine(Protocol):
    """What a task needs of an engine that is to write answers: `EngineProcess`, or a model in memory behind it."""

    def generate(self, prompts: Sequence[Sequence[int]], limits: Limits | Sequence[Limits]) -> list[Answer]:
        """Return the answer to each prompt of token ids, see `evaluator.backends.Engine`."""


class AskedEngine(NllEngine, GeneratingEngine, Protocol):
    """An engine that any task can ask."""


class Task(Protocol):
    """Items with one right answer each."""

    @property
    def name(self) -> str:
        """The name of the task in tables and in the formula of Perf."""

    @property
    def digest(self) -> str:
        """The digest of the items as a model reads them: 16 hexadecimal digits."""

    @property
    def longest(self) -> int:
        """The most tokens of one of its windows, or of a prompt with its answer."""

    @property
    def writes(self) -> bool:
        """Whether a model writes answers to it: it needs `generate`, and its result has `answers`."""

    def run(self, engine: AskedEngine, progress: Progress = None, look: Look = None) -> TaskResult:
        """Ask an engine all items.

        Args:
            engine: The engine.
            progress: A function that is told what is being done.
            look: A function that sees the first items' correctness before the others are asked, where asking is slow.

        Raises:
            NotFinite: The model is broken.
            EvaluationError: The engine raised it.
        """


class Kind(Protocol):
    """What a file of this folder offers; see the package's docstring."""

    Section: type[Section]

    def load(self, section: Any, tokenizer: Any) -> Task:
        """Return the task that a section of this kind describes."""


def names() -> list[str]:
    """Return the names of all kinds of task, which are the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def module_of(name: str) -> Kind:
    """Import and return a kind's file; nothing heavy is imported.

    Raises:
        EvaluationError: No kind of task has this name.
    """
    if name not in names():
        raise EvaluationError(f"task: {name!r} is not one of {', '.join(names())}")
    return cast(Kind, importlib.import_module(f"{__name__}.{name}"))


def load(kind: str, section: Section, tokenizer: Any) -> Task:
    """Return the task that a section describes.

    Args:
        kind: The name of the kind.
        section: An instance of that kind's own `Section`.
        tokenizer: A transformers tokenizer.

    Raises:
        EvaluationError: A file cannot be read, or does not hold what the kind needs.
    """
    return module_of(kind).load(section, tokenizer)


def result_of(correct: Sequence[float], digest: str, answers: Answers | None = None) -> TaskResult:
    """Return the result of a task whose items were answered correctly from 0 to 1 each."""
    values = tuple(float(value) for value in correct)
    return TaskResult(
        value=math.fsum(values) / len(values),
        se=standard_error(values),
        items=len(values),
        correct=values,
        digest=digest,
        answers=answers,
    )


def digest_of(items: Any) -> str:
    """Return 16 hexadecimal digits that name JSON values."""
    return hashlib.sha256(json.dumps(items, separators=(",", ":")).encode()).hexdigest()[:16]
