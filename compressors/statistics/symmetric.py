"""Pack a symmetric matrix into half of its numbers, and back: what is written and read of second moments is halved.

Symbols: H [K, K] with the halves h = ⌊K / 2⌋ and K − h. Kept are the last K − h columns of H, and in the strictly lower
triangle of their lower block, which the upper one repeats, that of H[:h, :h]; its diagonal comes last.
"""

from __future__ import annotations

import torch


def packed_size(width: int) -> int:
    """Return how many numbers `pack` makes of a matrix [K, K]."""
    return width * (width - width // 2) + width // 2


def pack(matrix: torch.Tensor) -> torch.Tensor:
    """Return the numbers [packed_size(K)] of a symmetric matrix [K, K]."""
    half = len(matrix) // 2
    kept = matrix[:, half:].clone()
    kept[half:].triu_()
    kept[half : 2 * half, :half] += matrix[:half, :half].tril(-1)
    return torch.cat([kept.flatten(), matrix.diagonal()[:half]])


def unpack(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Return the symmetric matrix [K, K] that was packed; K is `width`."""
    half = width // 2
    kept = packed[: width * (width - half)].view(width, width - half)
    matrix = packed.new_empty(width, width)
    matrix[:half, half:] = kept[:half]
    matrix[half:, :half] = kept[:half].T
    lower = kept[half:]
    upper = lower.triu()
    matrix[half:, half:] = upper + upper.triu(1).T
    first = lower[:half, :half].tril(-1)
    matrix[:half, :half] = first + first.T
    matrix.diagonal()[:half] = packed[width * (width - half) :]
    return matrix
