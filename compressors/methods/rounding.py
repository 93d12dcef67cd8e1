"""Round weights to the grid of a scheme: choose the scale of each group, and the value of each weight.

Symbols: N output and K input width of a Linear, g group size. Weights are symmetric: W8A8 and FP8_DYNAMIC have one
scale per output channel (g = K), W4A16 one per group of g inputs. Knows no checkpoint and no calibration.
"""

from __future__ import annotations

import torch

HALF_RANGE = {"W8A8": 127.5, "FP8_DYNAMIC": 448.0, "W4A16": 7.5, "W8A16": 127.5}
SHRINKS = {  # the scales to try, as shares of the one that reaches the largest magnitude
    "W8A8": tuple(1 - 0.02 * step for step in range(16)),
    "W8A16": tuple(1 - 0.02 * step for step in range(16)),
    "FP8_DYNAMIC": tuple(2 ** (-step / 16) for step in range(16)),  # a power of two moves no rounding
    "W4A16": tuple(1.06 - 0.02 * step for step in range(29)),
}
CHUNK = 2**22  # the number of weights whose candidates are tried at once


def to_grid(scaled: torch.Tensor, scheme: str) -> torch.Tensor:
    """Return the grid's nearest values to weights divided by their scale: integers, or float8_e4m3fn values."""
    if scheme == "FP8_DYNAMIC":
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).to(scaled.dtype)
    half = 2 ** ((4 if scheme == "W4A16" else 8) - 1)
    return scaled.round().clamp(-half, half - 1)


def largest_scales(weight: torch.Tensor, scheme: str, size: int | None) -> torch.Tensor:
    """Return scales [N, K/g] of the weight [N, K] in its dtype: the largest magnitude over half the range.

    They are computed as in compressed-tensors, and rounded to the 16-bit dtype that stores them. Values can then be
    chosen nearest to what they are multiplied out to.
    """
    groups = _groups(weight, size)
    return _stored(groups.abs().amax(dim=-1) / HALF_RANGE[scheme], weight.dtype)


def searched_scales(
    weight: torch.Tensor, scheme: str, size: int | None, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the scales [N, K/g] among SHRINKS of the largest that round to nearest with the least squared error.

    Args:
        weight: [N, K].
        scheme: The quantization scheme.
        size: The group size; None: K.
        importance: The weight [K] of each input's error, such as its mean square; None: all the same.
    """
    rows = max(1, CHUNK // weight.shape[1])
    parts = (weight[start : start + rows] for start in range(0, len(weight), rows))
    return torch.cat([_search(part, scheme, size, importance) for part in parts])


def _search(weight: torch.Tensor, scheme: str, size: int | None, importance: torch.Tensor | None) -> torch.Tensor:
    groups = _groups(weight, size)  # (N, K/g, g)
    counts = None if importance is None else importance.to(groups).reshape(1, groups.shape[1], -1)
    largest = groups.abs().amax(dim=-1) / HALF_RANGE[scheme]  # (N, K/g)
    best = least = None
    for share in SHRINKS[scheme]:
        scales = _stored(largest * share, weight.dtype)
        each = scales.float()[..., None]
        error = (to_grid(groups / each, scheme) * each - groups).square_()
        loss = (error if counts is None else error * counts).sum(dim=-1)
        if best is None or least is None:
            best, least = scales, loss
        else:
            better = loss < least
            best, least = torch.where(better, scales, best), torch.where(better, loss, least)
    assert best is not None
    return best


def _groups(weight: torch.Tensor, size: int | None) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.float().reshape(rows, -1, size or columns)  # (N, K/g, g)


def _stored(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scales = scales.to(dtype)
    return torch.where(scales == 0, torch.finfo(dtype).eps, scales)


def nearest(weight: torch.Tensor, scales: torch.Tensor, scheme: str) -> torch.Tensor:
    """Return the values [N, K] of the grid, as float32, nearest to the weight [N, K] with scales [N, K/g]."""
    groups = weight.float().reshape(*scales.shape, -1)
    return to_grid(groups / scales.float()[..., None], scheme).reshape(weight.shape)


def multiplied_out(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the weight, float32 [N, K], that values [N, K] and scales [N, K/g] stand for."""
    return (values.reshape(*scales.shape, -1) * scales.float()[..., None]).reshape(values.shape)
