"""GPTQ: a weight rounded column by column, each column's error made good by the columns that are still to come.

Frantar et al., https://arxiv.org/abs/2210.17323. Columns go in the order of their inputs' mean square ("activation
order"); groups and their scales are those of the original order, so that stock kernels load the result without an
index. Symbols: N output and K input width of a Linear, g group size, H = E[x xᵀ] the second moment of its input.
Knows no checkpoint.
"""

from __future__ import annotations

import functools

import torch

from compressors.errors import CheckpointError, InfeasiblePlan
from compressors.methods import rounding
from compressors.methods.quantizers import Moment, Rounded

DIAGONAL = 0.1  # both: see `damp`
MEDIAN = 0.1
MASSIVE = 8  # directions at most
MOST = 10.0
NOTHING = 1e-6  # of the trace: what is left is float32's rounding
POWER_STEPS = 16  # a direction with a quarter of the trace stands out by far
BLOCK = 128  # columns whose errors are passed on to the rest at once


def round_weight(weight: torch.Tensor, moment: Moment | None, scheme: str, size: int | None) -> Rounded:
    """Round by `gptq`, on the device of H."""
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
    """(values of the scheme's grid as float32 [N, K], scales in the weight's dtype [N, K/g]), on the weight's device.

    What they stand for, Q, keeps the output of inputs that are spread like `moment` [K, K]: it lowers
    tr((W − Q) H (W − Q)ᵀ). The arithmetic is done on the moment's device.

    size: g; None: K. diagonal, median: how strongly H is damped. scales: given ones; None: those of least squared
    error where each input counts by its mean square. Raises CheckpointError for a moment that is not finite.
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
    """(1 − diagonal) R + diagonal · diag(R) + median · m · I + M with m the median of diag(R), float64 [K, K].

    H = R + M was counted on one text, and the weight will see others: what one input says of another is trusted less
    than what it says of itself. Each input is damped by its own mean square and by an ordinary one's; an input that was
    always 0 counts as an ordinary one, apart from all others. M are the few directions that hold most of H, see
    `split`: they are no measure of what is ordinary, and are not damped.
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
    """(R, M): H [K, K] without its massive directions, and these with at most MOST times R's trace each.

    Massive is what holds more than a quarter of what is left of the trace, by power iteration: a mean, which all texts
    share; or one token's massive activations (https://arxiv.org/abs/2402.17762), a thousand times all that is ordinary:
    without a limit the rounding would be fitted to that token alone.
    """
    rest, found = moment, []
    for _ in range(MASSIVE):
        vector = rest[rest.diagonal().argmax()]
        for _ in range(POWER_STEPS):
            vector = rest @ (vector / vector.norm().clamp_min(torch.finfo(torch.float64).tiny))
        value = vector.norm()
        if not value > rest.trace() / 4:
            break
        unit = vector / value
        found.append((value, unit))
        rest = rest - value * torch.outer(unit, unit)
    massive = torch.zeros_like(moment)
    if rest.trace() < NOTHING * moment.trace():
        return moment, massive
    for value, unit in found:
        massive.addr_(unit, unit, alpha=float(value.clamp_max(MOST * rest.trace())))
    return rest, massive


def inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """Upper triangular U [K, K] with UᵀU = H⁻¹; of a singular H with as much more on its diagonal as it takes.

    From the Cholesky factor of H with its rows and columns reversed: H = R Rᵀ with R upper triangular, and U = R⁻¹.
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
    """The values [K, N] of the columns in `rest` [K, N], which is used up; each [K, N]: their scales."""
    values = torch.empty_like(rest)
    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        parts = rest[start:stop], each[start:stop], factor[start:stop, start:stop]
        if rest.is_cuda and stop - start == BLOCK:
            values[start:stop], errors = _recorded(rest.shape[1], scheme, rest.device)(*parts)
        else:
            values[start:stop], errors = _block(*parts, scheme)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return values


def _block(
    block: torch.Tensor, each: torch.Tensor, inner: torch.Tensor, scheme: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, errors to pass on), both [B, N], of the B columns in `block` [B, N]; each [B, N], inner [B, B]."""
    block, inner = block.clone(), inner.contiguous()
    values, errors = torch.empty_like(block), torch.empty_like(block)
    for i in range(len(block)):
        values[i] = rounding.to_grid(block[i] / each[i], scheme)
        torch.addcmul(block[i], values[i], each[i], value=-1, out=errors[i]).div_(inner[i, i])
        block[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
    return values, errors


class _Recorded:
    """`_block` of BLOCK columns as a CUDA graph: its thousand small kernels wait for no host. Tensors that it returns
    are its own, and the next call's.
    """

    def __init__(self, rows: int, scheme: str, device: torch.device) -> None:
        block, each = (torch.ones(BLOCK, rows, device=device) for _ in range(2))
        self.given = block, each, torch.eye(BLOCK, device=device)
        # a recording wants its kernels to have run before, on another stream
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            _block(*self.given, scheme)
        torch.cuda.current_stream(device).wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = _block(*self.given, scheme)

    def __call__(
        self, block: torch.Tensor, each: torch.Tensor, inner: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for place, value in zip(self.given, (block, each, inner), strict=True):
            place.copy_(value)
        self.graph.replay()
        return self.found


@functools.lru_cache(maxsize=8)  # a model's projections have three or four widths
def _recorded(rows: int, scheme: str, device: torch.device) -> _Recorded:
    return _Recorded(rows, scheme, device)
