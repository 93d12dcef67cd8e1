"""Quality of a model in memory: negative log-likelihood, KL divergence to the base model, top-1 agreement.

Symbols: T tokens of a window, V vocabulary. Log-softmax is computed in float32, whatever the model's dtype. For
candidates of near-equal quality the model itself should be float32 too: a base model in bfloat16 has a KL of 0.001 to
itself in float32, and nothing below that can be told apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from evaluator.errors import TextError

CHUNK = 128  # positions whose float32 log-probabilities are held at once: 52 MB at a vocabulary of 102,400


@dataclasses.dataclass(frozen=True)
class ShardQuality:
    """Means over a shard's predicted tokens, in nats. kl, agreement: None where the reference doesn't cover it.

    kl: KL(base ‖ model). agreement: share of positions where both put the same token first.
    """

    nll: float
    tokens: int
    kl: float | None = None
    agreement: float | None = None


@dataclasses.dataclass(frozen=True)
class Reference:
    """The base model on the shards.

    nll: mean of every shard. log_probs: of the first shards that fit into `max_bytes`, float16 [positions, V] each, in
    main memory; positions are the T − 1 predicted tokens of the shard's windows, one window after the other.
    """

    nll: tuple[float, ...]
    log_probs: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, model: Any, shards: Sequence[Sequence[Sequence[int]]], max_bytes: int) -> Reference:
        nll: list[float] = []
        kept: list[torch.Tensor] = []
        left = max_bytes
        for shard in shards:
            positions = sum(len(window) - 1 for window in shard)
            keep = len(kept) == len(nll) and positions * int(model.config.vocab_size) * 2 <= left
            parts, losses = [], []
            for window in shard:
                for log_probs, targets in log_prob_chunks(model, window):
                    losses.append(-log_probs.gather(1, targets[:, None])[:, 0])  # (chunk,)
                    if keep:
                        parts.append(log_probs.half().cpu())
            nll.append(float(torch.cat(losses).double().mean()))
            if keep:
                kept.append(torch.cat(parts))
                left -= kept[-1].nbytes
        return cls(tuple(nll), tuple(kept))


@torch.inference_mode()
def log_prob_chunks(model: Any, window: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(log-probabilities float32 [≤ CHUNK, V], the true next ids [≤ CHUNK]) along a window, on the model's device.

    The forward pass is the top-level one: a compressed-tensors model unpacks its weights there and nowhere else.
    """
    if len(window) < 2:
        raise TextError(f"quality: a window of {len(window)} tokens predicts nothing; take 2 or more")
    ids = torch.tensor([list(window)], device=model.device)  # (1, T)
    logits = model(input_ids=ids, use_cache=False).logits[0]  # (T, V)
    for start in range(0, len(window) - 1, CHUNK):
        stop = min(start + CHUNK, len(window) - 1)
        yield torch.log_softmax(logits[start:stop].float(), dim=-1), ids[0, start + 1 : stop + 1]


def window_nll(model: Any, window: Sequence[int]) -> torch.Tensor:
    """Negative log-likelihood of each token but the first, in nats: float32 [T − 1], in main memory."""
    losses = [-log_probs.gather(1, targets[:, None])[:, 0] for log_probs, targets in log_prob_chunks(model, window)]
    return torch.cat(losses).cpu()


@torch.inference_mode()
def shard_quality(
    model: Any, windows: Sequence[Sequence[int]], reference: Reference | None = None, index: int = 0
) -> ShardQuality:
    """Quality on one shard; `index` is its place in the reference. A broken model's NaN is passed on, not raised."""
    covered = reference is not None and index < len(reference.log_probs)
    base_log_probs = reference.log_probs[index] if reference is not None and covered else None  # (positions, V)
    nll, kl, agreed, tokens = 0.0, 0.0, 0, 0
    for window in windows:
        for log_probs, targets in log_prob_chunks(model, window):
            nll -= float(log_probs.gather(1, targets[:, None]).double().sum())
            if base_log_probs is not None:
                base = base_log_probs[tokens : tokens + len(targets)].to(log_probs.device).float()
                base = torch.log_softmax(base, dim=-1)  # float16 rounds: normalised again, KL can't be negative
                kl += float((base.exp() * (base - log_probs)).sum(dim=-1).double().sum())
                agreed += int((base.argmax(dim=-1) == log_probs.argmax(dim=-1)).sum())
            tokens += len(targets)
    if base_log_probs is None:
        return ShardQuality(nll / tokens, tokens)
    return ShardQuality(nll / tokens, tokens, kl / tokens, agreed / tokens)


def perplexity(nll_nats_per_token: float) -> float:
    """exp of the mean negative log-likelihood; infinite where that overflows."""
    try:
        return math.exp(nll_nats_per_token)
    except OverflowError:
        return math.inf
