"""Reads the questions of a task from JSONL files, one a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from evaluator import text_files
from evaluator.errors import TextError

T = TypeVar("T")
EXAMPLE = "example"  # among files: the questions that come with this program


def read(
    title: str, files: Sequence[str], example: Path, limit: int | None, shape: str, parse: Callable[[str], T]
) -> list[T]:
    """Return the questions of a task's files, in their order.

    Args:
        title: The task's name, for messages.
        files: The paths of the files; EXAMPLE stands for `example`.
        example: The file with the questions that come with this program.
        limit: The most questions; None: all.
        shape: What a line looks like, for messages.
        parse: Returns the question of a line; its TextError gets the file and the line.

    Raises:
        TextError: A line cannot be read, or there is no question.
    """
    questions: list[T] = []
    for path in (example if file == EXAMPLE else Path(file) for file in files):
        for number, line in text_files.json_lines(path, "task"):
            if len(questions) == limit:
                break
            try:
                questions.append(parse(line))
            except TextError as error:
                raise TextError(f"task {title}: {path}, line {number}: {error}") from None
    if not questions:
        raise TextError(f"task {title}: {', '.join(files)} holds no question; write lines like {shape}")
    return questions
