"""Questions with several choices, from JSONL files.

The model's answer is the choice whose tokens are likeliest on average.

A line is {"question": "…", "choices": ["…", "…"], "answer": …}. The answer is the choice's index from 0, its text, or
its letter. The score of a choice is the mean log-likelihood per token of its tokens after the question (GPT-3, section
2.4, https://arxiv.org/abs/2005.14165). Of equal scores the first wins.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from evaluator import tasks
from evaluator.errors import TextError
from evaluator.task_result import TaskResult
from evaluator.tasks import Look, NllEngine, Progress, _continuations, _questions, digest_of, result_of
from evaluator.tasks._continuations import Continuation
from readers import json_reader
from readers.errors import ReadError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
EXAMPLE_FILE = Path(__file__).with_name("example_choices.jsonl")
SHAPE = '{"question": "…", "choices": ["…", "…"], "answer": 0}'


class Section(tasks.Section):
    """Keys of this kind in a study file.

    Attributes:
        files: The paths of JSONL files in UTF-8; `example` names the questions that come with this program.
    """

    files: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.files:
            raise ValueError("multiple_choice needs files: JSONL with question, choices and answer; or [example]")
        return self


@dataclasses.dataclass(frozen=True)
class Item:
    """A question with each of its choices.

    Attributes:
        choices: The choices, each after the question.
        answer: The index of the right choice.
    """

    choices: tuple[Continuation, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """Questions that are read and tokenized; see `evaluator.tasks.Task`."""

    name: str
    items: tuple[Item, ...]
    digest: str
    longest: int
    writes: bool = False

    def run(self, engine: NllEngine, progress: Progress = None, look: Look = None) -> TaskResult:
        """Ask an engine all questions; an item is correct, 1.0, or not, 0.0."""
        asked = [choice for item in self.items for choice in item.choices]
        likelihoods = iter(_continuations.log_likelihoods(engine, asked, progress, self.name))
        correct = []
        for item in self.items:
            means = [math.fsum(values) / len(values) for values in (next(likelihoods) for _ in item.choices)]
            correct.append(float(means.index(max(means)) == item.answer))
        return result_of(correct, self.digest)


def load(section: Section, tokenizer: Any, *, max_tokens: int | None = None) -> MultipleChoice:
    """Return the questions of a section's files, in their order.

    A choice follows its question after a space, unless white space stands there already.

    Args:
        section: The section of the study file. Without a name the task has the first file's, without its suffix.
        tokenizer: A transformers tokenizer.
        max_tokens: The most tokens of a question with a choice; a longer question loses its beginning.

    Raises:
        TextError: A line cannot be read; the message names the file and the line.
    """
    title = section.name or Path(section.files[0]).stem

    def item_of(line: str) -> Item:
        question, choices, answer = _parse(line)
        encoded = (
            _continuations.encode(tokenizer, question, _spaced(question, choice), max_tokens) for choice in choices
        )
        return Item(tuple(encoded), answer)

    items = _questions.read(title, section.files, EXAMPLE_FILE, section.limit, SHAPE, item_of)
    read = [[[[choice.ids, choice.start] for choice in item.choices], item.answer] for item in items]
    return MultipleChoice(
        name=title,
        items=tuple(items),
        digest=digest_of(["mean log-likelihood per token", read]),
        longest=max(len(choice.ids) for item in items for choice in item.choices),
    )


def _parse(line: str) -> tuple[str, list[str], int]:
    """Return (question, choices, index of the answer)."""
    try:
        values = json_reader.parse(line, finite=False)
    except ReadError:
        values = None
    if not isinstance(values, dict):
        raise TextError(f"is not a JSON object; write {SHAPE}")
    missing = [key for key in ("question", "choices", "answer") if key not in values]
    if missing:
        raise TextError(f"{' and '.join(missing)} is missing; write {SHAPE}")
    question, choices, answer = values["question"], values["choices"], values["answer"]
    if not isinstance(question, str) or not question.strip():
        raise TextError(f"question is {question!r:.60}; it has to be a text")
    if not isinstance(choices, list) or len(choices) < 2:
        raise TextError(f"choices is {choices!r:.60}; it has to be a list of 2 texts or more")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise TextError(f"the choice {choice!r:.60} is no text; mend it")
    return question, choices, _index(answer, choices)


def _index(answer: Any, choices: list[str]) -> int:
    """Return the index of an answer: an index, a choice's text, or a letter. A text that is both is the choice."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
    elif isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        stripped = [choice.strip() for choice in choices]
        if answer.strip() in stripped:
            return stripped.index(answer.strip())
        letter = answer.strip().upper()
        if len(letter) == 1 and letter in LETTERS[: len(choices)]:
            return LETTERS.index(letter)
    last = len(choices) - 1
    raise TextError(
        f"answer is {answer!r:.60}; it has to be an index from 0 to {last}, a letter from A to "
        f"{LETTERS[min(last, 25)]}, or one of the choices"
    )


def _spaced(question: str, choice: str) -> str:
    return choice if choice[0].isspace() or question[-1].isspace() else f" {choice}"
