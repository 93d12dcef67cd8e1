"""Keeps a chat template from elsewhere from running for ever or filling the memory.

A chat template is a program of its model. Each chat is rendered in a child process with limits; see
`search.setup.chat_child`.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.errors import CheckpointError

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
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
        """Return the text of a chat.

        Args:
            messages: The messages, each with role and content.
            arguments: The template's other variables, such as add_generation_prompt and enable_thinking.

        Raises:
            CheckpointError: The template is none, or took too long or too much memory.
            ValueError: The template refuses the chat.
        """
        if self._process is None:
            self._start()
        variables = {**self._special, "tools": None, "documents": None, **arguments, "messages": list(messages)}
        answer = self._ask(variables, RENDER_S, "for a chat")
        if "error" in answer:
            raise ValueError(answer["error"])
        return str(answer["text"])

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._end = weakref.finalize(self, end, self._process)
        answer = self._ask(self._source, LOAD_S, "to be read")
        if "error" in answer:
            self._stop()
            raise self._refused(f"can't be read ({answer['error']})")

    def _ask(self, values: Any, limit_s: float, what: str) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        data = json.dumps(values).encode()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(len(data).to_bytes(4, "big") + data)
            process.stdin.flush()
        ends, line = time.monotonic() + limit_s, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, ends - time.monotonic()))
            if not ready:
                self._stop()
                raise self._refused(f"took more than {limit_s:.0f} s {what}")
            part = process.stdout.read1(1 << 20)  # type: ignore[attr-defined]  # a BufferedReader
            if not part:
                status = process.wait()
                how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
                self._stop()
                raise self._refused(f"needs too much memory ({how} {what})")
            line += part
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stop(self) -> None:
        self._end()
        self._process = None

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


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a child process and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
