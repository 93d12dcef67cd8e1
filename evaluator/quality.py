"""Functions for the quality of a model in memory: likelihood, KL divergence to the base model, top-1 agreement.

Shapes use T for the tokens of a window and V for the vocabulary. Log-softmax is computed in float32, whatever the
model's dtype. For candidates of nearly equal quality the model itself should be in float32 too. A base model in
bfloat16 has a KL of 0.001 to itself in float32, and smaller differences cannot be seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from evaluator.errors import TextError

CHUNK = 128  # positions whose float32 log-probabilities are in memory at once: 52 MB for 102,400 tokens


@dataclasses.dataclass(frozen=True)
class ShardQuality:
    """Means over a shard's predicted tokens.

    Attributes:
        nll: The negative log-likelihood, in nats.
        tokens: The number of predicted tokens.
        kl: KL(base ‖ model) in nats; None where the reference does not cover the shard.
        agreement: The share of positions where both put the same token first; None as for `kl`.
    """

    nll: float
    tokens: int
    kl: float | None = None
    agreement: float | None = None


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the base model predicts on the shards.

    Attributes:
        nll: The mean negative log-likelihood of each shard, in nats.
        log_probs: The log-probabilities of the first shards, as many as fit into memory: float16 [positions, V] each,
            in main memory. Positions are the T − 1 predicted tokens of the shard's windows, window after window.
    """

    nll: tuple[float, ...]
    log_probs: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, model: Any, shards: Sequence[Sequence[Sequence[int]]], max_bytes: int) -> Reference:
        """Run the base model on the shards; keep log-probabilities of at most `max_bytes` bytes."""
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
    """Yield (log-probabilities float32 [≤ CHUNK, V], true next ids [≤ CHUNK]) along a window, on the model's device.

    The forward pass is the top-level one, since a compressed-tensors model unpacks its weights only there.

    Raises:
        TextError: The window has fewer than 2 tokens.
    """
    if len(window) < 2:
        raise TextError(f"quality: a window of {len(window)} tokens predicts nothing; take 2 or more")
    ids = torch.tensor([list(window)], device=model.device)  # (1, T)
    logits = model(input_ids=ids, use_cache=False).logits[0]  # (T, V)
    for start in range(0, len(window) - 1, CHUNK):
        stop = min(start + CHUNK, len(window) - 1)
        yield torch.log_softmax(logits[start:stop].float(), dim=-1), ids[0, start + 1 : stop + 1]


def window_nll(model: Any, window: Sequence[int]) -> torch.Tensor:
    """Return the negative log-likelihood of each token except the first, in nats: float32 [T − 1], in main memory."""
    losses = [-log_probs.gather(1, targets[:, None])[:, 0] for log_probs, targets in log_prob_chunks(model, window)]
    return torch.cat(losses).cpu()


@torch.inference_mode()
def shard_quality(
    model: Any, windows: Sequence[Sequence[int]], reference: Reference | None = None, index: int = 0
) -> ShardQuality:
    """Return the quality of a model on one shard. A broken model's NaN is returned, not raised.

    Args:
        model: A transformers model.
        windows: The shard's windows of token ids.
        reference: What the base model predicts; without it there is neither KL nor agreement.
        index: The shard's place in the reference.
    """
    covered = reference is not None and index < len(reference.log_probs)
    base_log_probs = reference.log_probs[index] if reference is not None and covered else None  # (positions, V)
    nll, kl, agreed, tokens = 0.0, 0.0, 0, 0
    for window in windows:
        for log_probs, targets in log_prob_chunks(model, window):
            nll -= float(log_probs.gather(1, targets[:, None]).double().sum())
            if base_log_probs is not None:
                base = base_log_probs[tokens : tokens + len(targets)].to(log_probs.device).float()
                base = torch.log_softmax(base, dim=-1)  # float16 rounds; normalized again, KL cannot be negative
                kl += float((base.exp() * (base - log_probs)).sum(dim=-1).double().sum())
                agreed += int((base.argmax(dim=-1) == log_probs.argmax(dim=-1)).sum())
            tokens += len(targets)
    if base_log_probs is None:
        return ShardQuality(nll / tokens, tokens)
    return ShardQuality(nll / tokens, tokens, kl / tokens, agreed / tokens)


def perplexity(nll_nats_per_token: float) -> float:
    """Return the exponential of a mean negative log-likelihood, or infinity where that overflows."""
    try:
        return math.exp(nll_nats_per_token)
    except OverflowError:
        return math.inf
