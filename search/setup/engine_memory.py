"""What engines take of a GPU's memory beside their weights, and how much is left for keys and values."""

from __future__ import annotations

ENGINE_BYTES = 3 << 29  # that an engine takes beside its weights, keys and values
GENERATING_BYTES = 1 << 30  # that one takes in addition which generates: activations of 16,384 tokens in a step
PAIR_SHARE = 0.92  # of a GPU's memory that the base model's engine and a plan's may take together


def tokens_that_fit(wanted: int, longest: int, weights: int, kv_bytes: int, memory: int | None) -> int:
    """Return the tokens whose keys and values each of two engines on one GPU has room for, at most `wanted`.

    Where that is less, an engine generates fewer requests at once. The longest request has to fit in any case.

    Args:
        wanted: The tokens that would be held at once.
        longest: The tokens of the longest request with its answer.
        weights: The bytes of the base model's weights.
        kv_bytes: The bytes of the keys and values of a token.
        memory: The bytes of memory that the GPU has; None where that is not known.
    """
    if memory is None:
        return wanted
    each = int(PAIR_SHARE * memory) // 2 - weights - ENGINE_BYTES - GENERATING_BYTES
    return min(wanted, max(each // kv_bytes, longest))
