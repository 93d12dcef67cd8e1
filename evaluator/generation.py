"""What engines are asked to generate, and what came back."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """When an answer ends, and how its tokens are chosen.

    Attributes:
        max_tokens: The most tokens that are generated.
        stop: Texts that end the answer. A stop text is cut off, as in vLLM and lm-evaluation-harness.
        temperature: The temperature of sampling; 0 is greedy.
        seed: The random seed where tokens are sampled, so that no other answer changes this one. None: tokens are drawn
            together with those of others, from the engine's own source, which is many times as fast on a GPU.
        ignore_eos: Whether an end-of-sequence id counts as any other token, so that `max_tokens` are generated.
    """

    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int | None = 0
    ignore_eos: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an engine generated for one prompt.

    Attributes:
        tokens: The generated ids, without the end-of-sequence id.
        text: The decoded tokens, special tokens left out, the stop text cut off.
        finish: "stop" after an end-of-sequence id or a stop text, "length" after `max_tokens`.
        submitted_s: When the engine got the prompt, in seconds since the call began, monotonic.
        first_token_s: When the first token was there, on the same clock.
        last_token_s: When the last token was there, on the same clock.
    """

    tokens: tuple[int, ...]
    text: str
    finish: str
    submitted_s: float
    first_token_s: float
    last_token_s: float
