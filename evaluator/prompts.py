"""Reads the requests of a file: texts that a model continues, and chats that it answers.

A line of a JSONL file has a `prompt` or `messages`, or ShareGPT's `conversations`, of which the first question is
taken, with the system's message before it. A .json file holds a list of such objects. Other keys are not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evaluator import chat, text_files
from evaluator.errors import TextError
from readers import json_reader
from readers.errors import ReadError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "user": "user", "system": "system"}  # who speaks before the first answer
SHAPE = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'


@dataclasses.dataclass(frozen=True)
class Request:
    """A request of a file.

    Attributes:
        place: The file and the line, for messages.
        messages: The messages of a chat, each with role and content.
        is_chat: Whether it needs a chat template; else its texts are continued where there is none.
        is_prompt: Whether its text is continued in any case.
    """

    place: str
    messages: tuple[Mapping[str, str], ...]
    is_chat: bool
    is_prompt: bool = False

    def ids(self, tokenizer: Any, arguments: Mapping[str, Any]) -> list[int]:
        """Return the request's token ids.

        Args:
            tokenizer: A transformers tokenizer.
            arguments: Arguments of its chat template.

        Raises:
            TextError: It is a chat and there is no chat template, or the template refuses it, or it has no token.
        """
        try:
            if self.is_prompt or not (self.is_chat or chat.has_template(tokenizer)):
                ids = chat.prompt_ids(tokenizer, "\n\n".join(message["content"] for message in self.messages))
            else:
                ids = chat.chat_ids(tokenizer, self.messages, arguments)
        except TextError as error:
            raise TextError(f"{self.place}: {error}") from None
        if not ids:
            raise TextError(f"{self.place}: has no token; write a text")
        return ids


def read(path: Path, most: int) -> list[Request]:
    """Return the first requests of a file.

    Args:
        path: A .jsonl file, or a .json file that holds a list.
        most: The most requests.

    Raises:
        TextError: The file can't be read, or an entry is no request; the message names the file and the line.
    """
    found: list[Request] = []
    for place, text in _entries(path):
        if len(found) == most:
            break
        try:
            found.append(_request(place, json_reader.parse(text, finite=False) if isinstance(text, str) else text))
        except ReadError as error:
            raise TextError(f"{place}: {error}; write {SHAPE}") from None
    return found


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    content = text_files.content_of(path, "prompts", ".jsonl or .json")
    if path.suffix != ".json":
        for number, line in enumerate(content.split("\n"), start=1):  # splitlines would break a string at U+2028
            if line.strip():
                yield f"prompts {path}, line {number}", line
        return
    try:
        values = json_reader.parse(content, finite=False)
    except ReadError as error:
        raise TextError(f"prompts {path}: {error}") from None
    if not isinstance(values, list):
        raise TextError(f"prompts {path}: holds no list; write one, or a .jsonl file of lines like {SHAPE}")
    for number, value in enumerate(values, start=1):
        yield f"prompts {path}, entry {number}", value


def _request(place: str, values: Any) -> Request:
    if not isinstance(values, dict):
        raise TextError(f"{place}: is no JSON object; write {SHAPE}")
    kinds = [key for key in ("prompt", "messages", "conversations") if key in values]
    if len(kinds) != 1:
        raise TextError(f"{place}: has {' and '.join(kinds) or 'neither prompt nor messages'}; write {SHAPE}")
    given = values[kinds[0]]
    if kinds == ["prompt"]:
        if not isinstance(given, str) or not given:
            raise TextError(f"{place}: prompt is {given!r:.60}; it has to be a text")
        return Request(place, ({"role": "user", "content": given},), is_chat=False, is_prompt=True)
    if not isinstance(given, list) or not given:
        raise TextError(f"{place}: {kinds[0]} is {given!r:.60}; it has to be a list of messages")
    if kinds == ["messages"]:
        return Request(place, tuple(_message(place, one, "role", "content", ROLES) for one in given), is_chat=True)
    before = []
    for one in given:
        speaker = one.get("from") if isinstance(one, dict) else None
        if speaker not in SHAREGPT:
            break
        message = _message(place, one, "from", "value", tuple(SHAREGPT))
        before.append({"role": SHAREGPT[message["role"]], "content": message["content"]})
        if before[-1]["role"] == "user":
            return Request(place, tuple(before), is_chat=False)
    raise TextError(f"{place}: conversations begin with no question of a human; take the entry out")


def _message(place: str, one: Any, role: str, content: str, roles: tuple[str, ...]) -> dict[str, str]:
    if not isinstance(one, dict) or one.get(role) not in roles or not isinstance(one.get(content), str):
        raise TextError(f"{place}: the message {one!r:.80} needs {role} ({', '.join(roles)}) and {content}, a text")
    return {"role": one[role], "content": one[content]}
