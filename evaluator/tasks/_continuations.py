"""Contexts with their continuations as windows of token ids, and how likely a model finds the continuations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from evaluator import texts
from evaluator.errors import NotFinite, TextError
from evaluator.tasks import NllEngine, Progress

WINDOWS = 32  # the windows that an engine gets at once


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A context and its continuation as one window.

    Attributes:
        ids: The token ids of both.
        start: The index of the continuation's first token, at least 1.
    """

    ids: tuple[int, ...]
    start: int


def encode(tokenizer: Any, context: str, text: str, max_tokens: int | None = None) -> Continuation:
    """Return `text` as it follows `context`.

    Both are tokenized together. The continuation begins where these tokens differ from the context's own: a token
    across the border belongs to it. White space at the context's end goes to the continuation, as in `_encode_pair` of
    lm-evaluation-harness. Otherwise "Answer: " would end with a token that "Answer: yes" does not begin with.
    The window starts with BOS where the tokenizer adds one by itself. Otherwise it starts with BOS or EOS only where no
    token of the context is left.

    Args:
        tokenizer: A transformers tokenizer.
        context: The text before; it may be empty.
        text: The continuation.
        max_tokens: The most tokens of the window; the context is cut from its left.

    Raises:
        TextError: The continuation has no token of its own or does not fit; the message names neither file nor line.
    """
    bare = context.rstrip()
    before = _ids(tokenizer, bare) if bare else []
    whole = _ids(tokenizer, context + text)
    shared = 0
    while shared < min(len(before), len(whole)) and before[shared] == whole[shared]:
        shared += 1
    if shared == len(whole):
        raise TextError(f"{text!r:.60} adds no token to what stands before it; give it a text")
    lead = texts.lead(tokenizer)
    if not lead and not shared:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise TextError("nothing stands before it, and the tokenizer has neither BOS nor EOS; put a question there")
        lead = [first]
    if max_tokens is not None and len(lead) + len(whole) > max_tokens:
        follows = len(whole) - shared
        kept = max_tokens - len(lead) - follows  # of the context's tokens
        if kept < (0 if lead else 1):
            raise TextError(
                f"{text!r:.60} has {follows} tokens, which max_tokens {max_tokens} leaves no room for; raise it"
            )
        whole, shared = whole[shared - kept :], kept
    return Continuation((*lead, *whole), len(lead) + shared)


def rolling(tokenizer: Any, text: str, max_tokens: int) -> list[Continuation]:
    """Return all of a text as windows side by side, each after BOS, or EOS if the tokenizer has no BOS.

    Raises:
        TextError: The tokenizer has neither, or a window would hold no token.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = _ids(tokenizer, text)
    if first is None or max_tokens < 2:
        raise TextError(
            "a text's first token needs BOS or EOS and a max_tokens of 2 or more; the tokenizer has neither"
        )
    each = max_tokens - 1
    return [Continuation((first, *ids[begin : begin + each]), 1) for begin in range(0, len(ids), each)]


def log_likelihoods(
    engine: NllEngine, asked: Sequence[Continuation], progress: Progress = None, name: str = ""
) -> list[list[float]]:
    """Return the log-likelihood of each token of each continuation, in nats.

    Raises:
        NotFinite: The model is broken.
    """
    found: list[list[float]] = []
    for begin in range(0, len(asked), WINDOWS):
        batch = asked[begin : begin + WINDOWS]
        if progress is not None:
            progress(f"task {name}, window {begin + 1} of {len(asked)}")
        for continuation, nll in zip(batch, engine.nll([list(each.ids) for each in batch]), strict=True):
            found.append([-value for value in nll[continuation.start - 1 :]])
    if not all(math.isfinite(value) for values in found for value in values):
        raise NotFinite(f"task {name}: a log-likelihood is NaN or infinite; this model is broken")
    return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
