"""Keeps a chat template from elsewhere from running for ever or filling the memory.

A chat template is a program of its model. Each chat is rendered in a child process with limits; see
`search.setup.chat_child`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.errors import CheckpointError
from search.setup.limited_child import Ended, LimitedChild, TookTooLong

LOAD_S = 60.0
RENDER_S = 20.0  # for a chat; a busy machine needs some milliseconds
CHILD = Path(__file__).with_name("chat_child.py")


class ChatTemplate:
    """ChatTemplate renders chats with a model's template in a child process, which starts with the first chat.

    Args:
        model: The model's directory, for messages.
        source: The template.
        special: The special tokens that the template may write, by their names.
    """

    def __init__(self, model: Path, source: str, special: Mapping[str, Any]) -> None:
        self._model, self._source, self._special = model, source, dict(special)
        self._child: LimitedChild | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
        """Return the text of a chat.

        Args:
            messages: The messages, each with role and content.
            arguments: The template's other variables, such as add_generation_prompt and enable_thinking.

        Raises:
            CheckpointError: The template is none, or took too long or too much memory.
            ValueError: The template refuses the chat.
        """
        if self._child is None:
            self._start()
        variables = {**self._special, "tools": None, "documents": None, **arguments, "messages": list(messages)}
        answer = self._ask(variables, RENDER_S, "for a chat")
        if "error" in answer:
            raise ValueError(answer["error"])
        return str(answer["text"])

    def _start(self) -> None:
        self._child = LimitedChild(CHILD)
        answer = self._ask(self._source, LOAD_S, "to be read")
        if "error" in answer:
            self._stop()
            raise self._refused(f"can't be read ({answer['error']})")

    def _ask(self, values: Any, limit_s: float, what: str) -> dict[str, Any]:
        assert self._child is not None
        self._child.send(json.dumps(values).encode())
        try:
            answer: dict[str, Any] = json.loads(self._child.line(limit_s))
        except TookTooLong:
            self._stop()
            raise self._refused(f"took more than {limit_s:.0f} s {what}") from None
        except Ended as ended:
            self._stop()
            raise self._refused(f"needs too much memory ({ended} {what})") from None
        return answer

    def _stop(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _refused(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"model {self._model}: its chat template {why}; copy the original model's there, or write prompts in place "
            "of messages"
        )


def chat_template_of(model: Path, tokenizer: Any) -> ChatTemplate | None:
    """Return the chat template of a tokenizer: the one called default of several; None where there is none."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        return None
    special = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str | list)}
    return ChatTemplate(model, source, special)
