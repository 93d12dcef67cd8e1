"""Rounds a weight by GPTQ: column by column, where later columns compensate for the errors of earlier ones.

Frantar et al., https://arxiv.org/abs/2210.17323. Columns are rounded in descending order of their inputs' mean square
("activation order"). Groups and scales follow the original order, so that stock kernels load the result without an
index. Symbols: N output and K input width of a Linear, g group size, H = E[x xᵀ] the second moment of its input.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable

import torch

from compressors.errors import CheckpointError, InfeasiblePlan
from compressors.methods import rounding
from compressors.methods.quantizers import Moment, Rounded

LOG = logging.getLogger(__name__)
DIAGONAL = 0.1  # see `damp`
MEDIAN = 0.1  # see `damp`
MASSIVE = 8  # the largest number of massive directions, see `split`
MOST = 10.0  # the largest trace of a massive direction, in traces of the rest
NOTHING = 1e-6  # the share of the trace below which the rest is only float32's rounding
POWER_STEPS = 16  # enough, since a direction with a quarter of the trace is far ahead
BLOCK = 128  # the columns whose errors are added to the rest at once

Rounding = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str], tuple[torch.Tensor, torch.Tensor]]  # see `_block`


def round_weight(weight: torch.Tensor, moment: Moment | None, scheme: str, size: int | None) -> Rounded:
    """Round a weight by `gptq`, on the device of H.

    Raises:
        InfeasiblePlan: There are no second moments.
    """
    if moment is None:
        raise InfeasiblePlan("quantizer: gptq needs second moments from calibration text; choose mse without them")
    return gptq(weight, moment(), scheme, size)


def gptq(
    weight: torch.Tensor,
    moment: torch.Tensor,
    scheme: str,
    size: int | None,
    *,
    diagonal: float = DIAGONAL,
    median: float = MEDIAN,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight so that its outputs change little: approximately minimize tr((W − Q) H (W − Q)ᵀ).

    Q is the rounded weight, values times scales. The arithmetic is done on the moment's device.

    Args:
        weight: The weight W [N, K].
        moment: The second moment H of the input [K, K].
        scheme: The scheme, which sets the grid.
        size: The group size g; None: K.
        diagonal: The damping by each input's own mean square, see `damp`.
        median: The damping by the median mean square, see `damp`.
        scales: The scales [N, K/g]; None: those with the least squared error, weighted by the inputs' mean square.

    Returns:
        Values on the scheme's grid as float32 [N, K], and scales in the weight's dtype [N, K/g]; both on the weight's
        device.

    Raises:
        CheckpointError: The moment is not finite.
    """
    home, weight = weight.device, weight.to(moment.device)
    damped = damp(moment, diagonal, median)
    if scales is None:
        scales = rounding.searched_scales(weight, scheme, size, damped.diagonal())
    order = torch.argsort(damped.diagonal(), descending=True, stable=True)
    factor = inverse_factor(damped[order][:, order]).float()  # (K, K)
    group_of = torch.arange(len(order), device=order.device) // (size or len(order))
    each = scales.to(moment.device).float().T[group_of[order]]  # (K, N)
    rest = weight.float().T[order]  # (K, N): a column of the weight is a row here
    values = torch.empty_like(rest)
    values[order] = _columns(rest, each, factor, scheme)
    return values.T.contiguous().to(home), scales.to(home)


def damp(moment: torch.Tensor, diagonal: float = DIAGONAL, median: float = MEDIAN) -> torch.Tensor:
    """Return H damped: (1 − diagonal) R + diagonal · diag(R) + median · m · I + M, float64 [K, K].

    m is the median of diag(R). H = R + M was measured on one text, and the weight will see others: correlations between
    inputs are less reliable than their mean squares. Each input is damped by its own mean square and by the median one.
    An input that was always 0 gets the median mean square and no correlations. M holds the few directions that make up
    most of H, see `split`; they would distort the median, and are not damped.

    Raises:
        CheckpointError: H is not finite.
    """
    if not torch.isfinite(moment).all():
        raise CheckpointError("calibration: a second moment is NaN or infinite; the base model's weights are broken")
    rest, massive = split(moment.double())
    own = rest.diagonal().clamp_min(0)
    live = own[own > 0]
    typical = live.median() if len(live) else torch.ones_like(own).mean()
    damped = (1 - diagonal) * rest
    damped.diagonal().copy_(torch.where(own > 0, own, typical) + median * typical)
    return damped + massive


def split(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split H [K, K] into (R, M): the rest, and its massive directions.

    A direction is massive if it holds more than a quarter of the remaining trace; power iteration finds it. It is
    either the mean of the inputs, which all texts share, or one token's massive activations
    (https://arxiv.org/abs/2402.17762), a thousand times the others. Each counts in M for at most MOST times R's trace:
    otherwise the rounding would fit that one token only.
    """
    rest, directions = moment, []
    for _ in range(MASSIVE):
        vector = rest[rest.diagonal().argmax()]
        for _ in range(POWER_STEPS):
            vector = rest @ (vector / vector.norm().clamp_min(torch.finfo(torch.float64).tiny))
        value = vector.norm()
        if not value > rest.trace() / 4:
            break
        unit = vector / value
        directions.append((value, unit))
        rest = rest - value * torch.outer(unit, unit)
    massive = torch.zeros_like(moment)
    if rest.trace() < NOTHING * moment.trace():
        return moment, massive
    for value, unit in directions:
        massive.addr_(unit, unit, alpha=float(value.clamp_max(MOST * rest.trace())))
    return rest, massive


def inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """Return the upper triangular U [K, K] with UᵀU = H⁻¹; a singular H gets as much added to its diagonal as needed.

    It comes from the Cholesky factor of H with rows and columns reversed: H = R Rᵀ, R upper triangular, and U = R⁻¹.
    """
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    lower, failed = torch.linalg.cholesky_ex(moment.flip(0, 1))
    more = 1e-10
    while failed:
        lower, failed = torch.linalg.cholesky_ex((moment + more * moment.diagonal().mean() * eye).flip(0, 1))
        more *= 10
    inverse: torch.Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.flip(0, 1)


def _columns(rest: torch.Tensor, each: torch.Tensor, factor: torch.Tensor, scheme: str) -> torch.Tensor:
    """Return the values [K, N] of the columns in `rest` [K, N], which is overwritten; `each` [K, N] are scales."""
    values = torch.empty_like(rest)
    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        parts = rest[start:stop], each[start:stop], factor[start:stop, start:stop]
        rounded = _kernel(rest.device) if rest.is_cuda and stop - start == BLOCK else _block
        values[start:stop], errors = rounded(*parts, scheme)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return values


def _block(
    block: torch.Tensor, each: torch.Tensor, inner: torch.Tensor, scheme: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values and the errors [B, N] of B columns; `block` and `each` are [B, N], `inner` is [B, B]."""
    block, inner = block.clone(), inner.contiguous()
    values, errors = torch.empty_like(block), torch.empty_like(block)
    for i in range(len(block)):
        values[i] = rounding.to_grid(block[i] / each[i], scheme)
        torch.addcmul(block[i], values[i], each[i], value=-1, out=errors[i]).div_(inner[i, i])
        block[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
    return values, errors


@functools.cache
def _kernel(device: torch.device) -> Rounding:
    """Return what rounds BLOCK columns on a GPU: the kernel, or `_block` where it can't be compiled.

    Triton wants a C compiler and Python's headers besides itself.
    """
    try:
        block: Rounding = importlib.import_module("compressors.methods.gptq_kernel").block
        one = torch.eye(BLOCK, device=device)
        block(one, torch.ones_like(one), one, "W8A8")
    except Exception as error:  # compilers fail in many ways, and the result is the same without
        LOG.warning("gptq: rounds column by column, which takes several times as long: Triton: %s", error)
        return _block
    return block
