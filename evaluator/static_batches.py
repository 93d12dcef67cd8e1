"""Generation with a transformers model in static batches: prompts of about one length are padded on the left together.

A batch ends with its longest answer. Rows whose answers ended leave it when half of them have. In float32 every row
gets the tokens that it would get alone: padding is masked, and positions count from a prompt's first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from evaluator.answering import Asked, Growth
from evaluator.errors import NotFinite

TOGETHER = 32  # sequences in a batch, where nothing else is said
TOKENS = 16384  # in a batch at its end, padding among them
ALONE = ("dynamic", "longrope")  # rope types whose frequencies depend on the longest sequence of a batch


def batches(asked: Sequence[Asked], together: int = TOGETHER, tokens: int = TOKENS) -> list[list[int]]:
    """Return the indices of the requests of each batch, the longest prompts first.

    A batch holds at most `together` sequences, and at most `tokens` tokens when its answers are as long as they may be;
    a request that is longer alone is a batch of its own.
    """
    found: list[list[int]] = []
    longest = most = 0
    for index in sorted(range(len(asked)), key=lambda index: -len(asked[index].prompt)):
        one = asked[index]
        wider = max(most, one.limits.max_tokens)
        size = len(found[-1]) + 1 if found else 0
        if not found or size > together or size * (longest + wider) > tokens:
            found.append([])
            longest, wider = len(one.prompt), one.limits.max_tokens
        most = wider
        found[-1].append(index)
    return found


def at_most_together(config: Any, together: int) -> int:
    """Return how many sequences of a model may be in a batch and still get the tokens that they get alone."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    return 1 if any(kind.get("rope_type") in ALONE for kind in kinds) else together


def generate(
    model: Any, asked: Sequence[Asked], growing: Sequence[Growth], clock: Callable[[], float], source: Any
) -> None:
    """Let the answers of one batch grow to their ends.

    Args:
        model: A transformers model that is ready.
        asked: The requests.
        growing: The answer of each, which takes its tokens.
        clock: Returns the seconds since the call began.
        source: The torch.Generator, on the model's device, of answers without a seed of their own.

    Raises:
        NotFinite: A token is to be drawn, and the model's logits are not finite.
    """
    import torch

    device = model.device
    longest = max(len(one.prompt) for one in asked)
    rows = [[0] * (longest - len(one.prompt)) + list(one.prompt) for one in asked]
    ids = torch.tensor(rows, device=device)  # [batch, longest]
    lengths = torch.tensor([len(one.prompt) for one in asked], device=device)
    mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    left = [(growth, _generator(growth)) for growth in growing]
    cache = None
    with torch.inference_mode():
        while True:
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            chosen = _chosen(out.logits[:, -1], left, source)  # on the CPU: the device has finished
            now = clock()
            goes_on = [
                place
                for place, ((growth, _), token) in enumerate(zip(left, chosen, strict=True))
                if not growth.take(token, now)
            ]
            if not goes_on:
                return
            ids = torch.tensor(chosen, device=device)[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            if 2 * len(goes_on) <= len(left):
                kept = torch.tensor(goes_on, device=device)
                ids, positions, mask = ids[kept], positions[kept], mask[kept]
                cache.batch_select_indices(kept)
                left = [left[place] for place in goes_on]


def _generator(growth: Growth) -> Any:
    """Return an answer's own source of random numbers; None where it is greedy or has no seed."""
    import torch

    limits = growth.limits
    return torch.Generator().manual_seed(limits.seed) if limits.temperature > 0.0 and limits.seed is not None else None


def _chosen(logits: Any, left: Sequence[tuple[Growth, Any]], source: Any) -> list[int]:
    """Return the next token of each row of logits [batch, vocabulary]: the likeliest, or one that is drawn."""
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    growing = [(place, growth.limits, own) for place, (growth, own) in enumerate(left) if not growth.finish]
    drawn = [(place, limits, own) for place, limits, own in growing if limits.temperature > 0.0]
    for place, limits, own in drawn:
        if own is not None:
            (chosen[place],) = _drawn(logits[place : place + 1].float().cpu(), [limits.temperature], own)
    together = [(place, limits.temperature) for place, limits, own in drawn if own is None]
    if together:
        places, temperatures = zip(*together, strict=True)
        for place, token in zip(places, _drawn(logits[list(places)].float(), temperatures, source), strict=True):
            chosen[place] = token
    return chosen


def _drawn(logits: Any, temperatures: Sequence[float], source: Any) -> list[int]:
    """Return a token that is drawn for each row of logits [rows, vocabulary]."""
    import torch

    scores = logits / torch.tensor(temperatures, device=logits.device)[:, None]
    if not bool(scores.isfinite().any(dim=-1).all()) or bool(scores.isnan().any()):
        raise NotFinite("the logits of an answer are NaN or infinite; this model is broken")
    tokens: list[int] = torch.multinomial(scores.softmax(dim=-1), 1, generator=source)[:, 0].tolist()
    return tokens
