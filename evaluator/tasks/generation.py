"""Questions whose answers a model writes, from JSONL files.

A line has `messages` of a chat or a `prompt`, and the right `answer` or several `answers`:

    {"prompt": "What is 3 + 4?", "answer": "7"}
    {"messages": [{"role": "user", "content": "…"}], "system": "…", "answers": ["…", "…"], "match": "contains"}

A prompt is one user's message. Messages are rendered by the tokenizer's own chat template; without a chat template, or
with `template: false`, a prompt is the text that the model continues. An optional `system` comes first. `id` is not
read. Decoding is greedy. The answer ends at the end-of-sequence id, at a stop text, or after `max_tokens`.

Each answer scores from 0 to 1 by `match`; `evaluator.matching` says what each match compares. A line's own `match` goes
before the section's. What a model writes is compared as text and never run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from evaluator import chat, lengths, matching, tasks
from evaluator.errors import TextError
from evaluator.generation import Answer, Limits
from evaluator.task_result import TaskResult
from evaluator.tasks import GeneratingEngine, Look, Progress, _questions, digest_of, result_of
from readers import json_reader
from readers.errors import ReadError

EXAMPLE_FILE = Path(__file__).with_name("example.jsonl")
SHAPE = '{"prompt": "…", "answer": "…"}'
KEYS = ("messages", "prompt", "system", "answer", "answers", "match", "id")
ROLES = ("system", "user", "assistant")
FIRST = 16  # questions that are asked before the others
TOGETHER = 64  # prompts that an engine gets at once

Match = Literal["exact", "contains", "numeric", "choice", "f1", "rouge_l"]


class Section(tasks.Section):
    """Keys of this kind in a study file.

    Attributes:
        files: The paths of JSONL files in UTF-8; `example` names the questions that come with this program.
        match: How an answer is compared with the right ones; see `evaluator.matching`.
        max_tokens: The most tokens of an answer.
        stop: Texts that end an answer, and are cut off.
        template: Arguments of the chat template, such as {enable_thinking: false}; false: no chat template is used.
    """

    files: list[str] = Field(default_factory=list)
    match: Match = "contains"
    max_tokens: Annotated[int, Field(ge=1)] = 256
    stop: list[str] = Field(default_factory=list)
    template: dict[str, Any] | Literal[False] = Field(default_factory=dict)

    @field_validator("stop")
    @classmethod
    def _stops(cls, values: list[str]) -> list[str]:
        if not all(values):
            raise ValueError("stop: an empty text ends every answer; leave it out")
        return values

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.files:
            raise ValueError("generation needs files: JSONL with prompt or messages, and answer; or [example]")
        return self


@dataclasses.dataclass(frozen=True)
class Question:
    """A question as the model reads it, and how its answer is judged.

    Attributes:
        ids: The token ids of the prompt.
        text: What was asked, as people read it: the prompt, or the last message.
        right: The right answers.
        match: One of `evaluator.matching.MATCHES`.
    """

    ids: tuple[int, ...]
    text: str
    right: tuple[str, ...]
    match: str


@dataclasses.dataclass(frozen=True)
class Generation:
    """Questions that are read and tokenized; see `evaluator.tasks.Task`."""

    name: str
    questions: tuple[Question, ...]
    limits: Limits
    digest: str
    longest: int
    writes: bool = True

    def run(self, engine: GeneratingEngine, progress: Progress = None, look: Look = None) -> TaskResult:
        """Ask an engine all questions; `look` sees the scores of the first FIRST."""
        found: list[Answer] = []
        correct: list[float] = []
        for begin, end in _batches(len(self.questions)):
            if progress is not None:
                progress(f"task {self.name}, answer {begin + 1} of {len(self.questions)}")
            asked = self.questions[begin:end]
            answers = engine.generate([question.ids for question in asked], self.limits)
            found += answers
            correct += [
                matching.score(question.match, answer.text, question.right)
                for question, answer in zip(asked, answers, strict=True)
            ]
            if begin == 0 and look is not None:
                look(tuple(correct))
        texts = [question.text for question in self.questions]
        expected = [" | ".join(question.right) for question in self.questions]
        return result_of(correct, self.digest, lengths.answers_of(found, texts, expected))


def _batches(questions: int) -> list[tuple[int, int]]:
    """Return the (begin, end) of the questions that are asked together: the first few, then the others."""
    begins = [0, *range(FIRST, questions, TOGETHER)]
    return list(zip(begins, [*begins[1:], questions], strict=True))


def load(section: Section, tokenizer: Any, *, max_tokens: int | None = None) -> Generation:
    """Return the questions of a section's files, in their order.

    Args:
        section: The section of the study file. Without a name the task has the first file's, without its suffix.
        tokenizer: A transformers tokenizer.
        max_tokens: The most tokens of a prompt with its answer; None: as many as it takes.

    Raises:
        TextError: A line cannot be read; the message names the file and the line.
    """
    title = section.name or Path(section.files[0]).stem

    def question_of(line: str) -> Question:
        question = _question(_parse(line), section, tokenizer)
        if max_tokens is not None and len(question.ids) + section.max_tokens > max_tokens:
            raise TextError(
                f"its prompt has {len(question.ids)} tokens, which leave no room for {section.max_tokens} more among "
                f"{max_tokens}; shorten it, or lower max_tokens"
            )
        return question

    questions = _questions.read(title, section.files, EXAMPLE_FILE, section.limit, SHAPE, question_of)
    limits = Limits(section.max_tokens, tuple(section.stop))
    read = [[question.ids, question.right, question.match] for question in questions]
    return Generation(
        name=title,
        questions=tuple(questions),
        limits=limits,
        digest=digest_of(["generation", matching.VERSION, limits.max_tokens, limits.stop, read]),
        longest=max(len(question.ids) for question in questions) + section.max_tokens,
    )


def _parse(line: str) -> dict[str, Any]:
    """Return the values of a line, whose keys are known."""
    try:
        values = json_reader.parse(line, finite=False)
    except ReadError:
        values = None
    if not isinstance(values, dict):
        raise TextError(f"is not a JSON object; write {SHAPE}")
    unknown = [key for key in values if key not in KEYS]
    if unknown:
        raise TextError(f"{unknown[0]!r:.60} is no key of a question; there are {', '.join(KEYS)}")
    for one, other in (("prompt", "messages"), ("answer", "answers")):
        if (one in values) == (other in values):
            how = f"has both {one} and {other}; keep" if one in values else f"has neither {one} nor {other}; write"
            raise TextError(f"{how} one of the two")
    return values


def _question(values: dict[str, Any], section: Section, tokenizer: Any) -> Question:
    match = values.get("match", section.match)
    if match not in matching.MATCHES:
        raise TextError(f"match is {match!r:.60}; it has to be one of {', '.join(matching.MATCHES)}")
    right = _right(values, match)
    system = values.get("system")
    if system is not None:
        system = _text_of(system, "system")
    if "messages" in values:
        messages = _messages(values["messages"])
    else:
        messages = [{"role": "user", "content": _text_of(values["prompt"], "prompt")}]
    text = messages[-1]["content"]
    if system is not None:
        if messages[0]["role"] == "system":
            raise TextError("has a system message both in messages and in system; keep one of the two")
        messages = [{"role": "system", "content": system}, *messages]
    ids = _ids(messages, "messages" in values, section, tokenizer)
    if not ids:
        raise TextError("its prompt has no token")
    return Question(tuple(ids), text, right, match)


def _right(values: dict[str, Any], match: str) -> tuple[str, ...]:
    """Return the right answers; numbers are read as they are written."""
    given = [values["answer"]] if "answer" in values else values["answers"]
    if not isinstance(given, list) or not given:
        raise TextError(f"answers is {given!r:.60}; it has to be a list of one text or more")
    right = []
    for one in given:
        if isinstance(one, int | float) and not isinstance(one, bool):
            one = str(one)
        if not isinstance(one, str) or not one.strip():
            raise TextError(f"the answer {one!r:.60} is no text; mend it")
        why = matching.refusal(match, one)
        if why is not None:
            raise TextError(f"the answer {one!r:.60} {why}; mend it")
        right.append(one)
    return tuple(right)


def _messages(given: Any) -> list[dict[str, str]]:
    if not isinstance(given, list) or not given:
        raise TextError(f"messages is {given!r:.60}; it has to be a list of messages with role and content")
    messages = []
    for one in given:
        if not isinstance(one, dict) or set(one) != {"role", "content"} or one["role"] not in ROLES:
            raise TextError(f"the message {one!r:.80} needs role ({', '.join(ROLES)}) and content, and nothing else")
        messages.append({"role": one["role"], "content": _text_of(one["content"], "content")})
    if messages[-1]["role"] != "user":
        raise TextError(f"its last message is the {messages[-1]['role']}'s; the user's has to be the last")
    return messages


def _text_of(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TextError(f"{key} is {value!r:.60}; it has to be a text")
    return value


def _ids(messages: Sequence[dict[str, str]], is_chat: bool, section: Section, tokenizer: Any) -> list[int]:
    """Return the token ids of a chat, or of plain text where the tokenizer has no chat template or none is wanted."""
    if section.template is False and is_chat:
        raise TextError("has messages, and template is false; write prompt, which is continued as it is")
    if section.template is not False and (is_chat or chat.has_template(tokenizer)):
        return chat.chat_ids(tokenizer, messages, section.template or {})
    return chat.prompt_ids(tokenizer, "\n\n".join(message["content"] for message in messages))
