"""Chats and plain prompts become token ids, as a server would make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluator.errors import EvaluationError, TextError

Messages = Sequence[Mapping[str, str]]  # each with role and content


def has_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_ids(tokenizer: Any, messages: Messages, arguments: Mapping[str, Any] | None = None) -> list[int]:
    """Return the token ids of a chat, up to where the model's answer begins.

    The text is the tokenizer's own chat template's, which writes its special tokens itself.

    Args:
        tokenizer: A transformers tokenizer. Where it is untrusted, its `apply_chat_template` has to be guarded.
        messages: The messages of the chat.
        arguments: Arguments of the template, such as {"enable_thinking": False}.

    Raises:
        TextError: The tokenizer has no chat template, or the template refuses the chat.
    """
    if not has_template(tokenizer):
        raise TextError("has messages, and the tokenizer has no chat template; write a prompt in place of messages")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **(arguments or {})
        )
    except EvaluationError:
        raise
    except Exception as error:  # a template is a program from outside
        first = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise TextError(f"the chat template refuses it: {first}") from None
    return list(tokenizer.encode(text, add_special_tokens=False))


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a text that the model continues, with what the tokenizer itself puts before a text."""
    return list(tokenizer.encode(prompt))
