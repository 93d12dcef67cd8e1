"""What a model is asked beside a text's perplexity, one kind of task a file; its name is the kind's in a study file.

A file holds
    load(…) -> Task     reads local files, checks them and tokenises them; what it takes is the kind's own
A task knows no model: it hands windows of token ids to whatever has `nll`, and decides by the likelihoods.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import pkgutil
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

from evaluator.errors import EvaluationError
from evaluator.measurement import TaskResult
from evaluator.score import standard_error

__all__ = ["NllEngine", "Task", "TaskResult", "digest_of", "module_of", "names", "result_of"]

Progress = Callable[[str], None] | None  # told what is being done


class NllEngine(Protocol):
    """What a task needs of an engine: `EngineProcess`, or a model in memory behind the same method."""

    def nll(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Negative log-likelihood in nats of each token but the first: T − 1 numbers per window of T ids."""


class Task(Protocol):
    """Items with one right answer each.

    digest: of the items as a model reads them, 16 hexadecimal digits. longest: most tokens of one of its windows.
    """

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def longest(self) -> int: ...

    def run(self, engine: NllEngine, progress: Progress = None) -> TaskResult:
        """Raises NotFinite for a broken model, and what the engine raises."""


def names() -> list[str]:
    """The kinds of task there are: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def module_of(name: str) -> ModuleType:
    """The kind's file, imported; nothing heavy is. Raises EvaluationError for an unknown name."""
    if name not in names():
        raise EvaluationError(f"task: {name!r} is not one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def result_of(correct: Sequence[float], digest: str) -> TaskResult:
    """correct: of each item, 0 to 1."""
    values = tuple(float(value) for value in correct)
    return TaskResult(
        value=math.fsum(values) / len(values),
        se=standard_error(values),
        items=len(values),
        correct=values,
        digest=digest,
    )


def digest_of(items: Any) -> str:
    """Names JSON values: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(items, separators=(",", ":")).encode()).hexdigest()[:16]
