"""Prompts of lm-evaluation-harness as token ids with their limits, and the answers that an engine writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from evaluator import texts
from evaluator.errors import TextError
from evaluator.generation import Answer, Limits
from evaluator.tasks import GeneratingEngine, Progress

TOGETHER = 64  # prompts that an engine gets at once
MAX_GEN_TOKS = 256  # where a task says nothing: the harness's own
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # its names, the first wins


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, and when its answer ends."""

    ids: tuple[int, ...]
    limits: Limits


def encode(tokenizer: Any, requests: Sequence[Any], max_tokens: int | None) -> list[Prompt]:
    """Encode requests whose arguments are (context, keyword arguments of the generation).

    Args:
        tokenizer: A transformers tokenizer.
        requests: The harness's requests.
        max_tokens: The most tokens of a prompt with its answer; a longer prompt loses its beginning, but for BOS.

    Raises:
        TextError: An answer leaves no room for its prompt, or the arguments make no sense.
    """
    found, first = [], texts.lead(tokenizer)
    for request in requests:
        context, arguments = request.args[0], request.args[1]
        limits = limits_of(arguments)
        if limits.temperature > 0 and getattr(request, "repeats", 1) > 1:
            raise TextError("it samples several answers to each prompt; set repeats: 1 in its YAML file")
        ids = list(tokenizer.encode(context, verbose=False))
        if max_tokens is not None:
            room = max_tokens - limits.max_tokens
            if room <= len(first):
                raise TextError(f"its answers of {limits.max_tokens} tokens leave no room for a prompt in {max_tokens}")
            ids = ids if len(ids) <= room else [*first, *ids[len(first) - room :]]
        if not ids:
            raise TextError("a prompt has no token; put a question there")
        found.append(Prompt(tuple(ids), limits))
    return found


def limits_of(arguments: dict[str, Any]) -> Limits:
    """Return the limits in a task's generation_kwargs, as `normalize_gen_kwargs` of the harness reads them.

    Raises:
        TextError: A value has another type.
    """
    until = arguments.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    most = next((arguments[name] for name in LENGTHS if arguments.get(name) is not None), MAX_GEN_TOKS)
    try:
        most, temperature = int(most), float(arguments.get("temperature") or 0.0)
    except (TypeError, ValueError):
        raise TextError(f"its generation_kwargs are {arguments!r:.120}; give numbers") from None
    if most < 1 or temperature < 0 or not all(isinstance(stop, str) for stop in stops):
        raise TextError(f"its generation_kwargs are {arguments!r:.120}, which make no sense")
    if arguments.get("do_sample") is False:
        temperature = 0.0
    return Limits(most, tuple(stop for stop in stops if stop), temperature)


def answers(engine: GeneratingEngine, asked: Sequence[Prompt], progress: Progress, name: str) -> list[Answer]:
    """Return the answer to each prompt; an engine gets TOGETHER of them at once."""
    found: list[Answer] = []
    for begin in range(0, len(asked), TOGETHER):
        if progress is not None:
            progress(f"task {name}, answer {begin + 1} of {len(asked)}")
        batch = asked[begin : begin + TOGETHER]
        found += engine.generate([each.ids for each in batch], [each.limits for each in batch])
    return found
