"""Repair in closed form: the kept weights take over what was cut, by least squares on the calibration text.

Symbols: W [N, K] a projection, S its kept inputs and R the removed ones, H [K, K] the second moment of its input.

    W' = W[:, S] + W[:, R] H[R, S] (H[S, S] + λ I)⁻¹

minimises E‖W x − W' x_S‖² + λ ‖W' − W[:, S]‖². The ridge pulls toward the kept weights and not toward zero, so what the
text does not determine is left alone. ZipLM (https://arxiv.org/abs/2302.04089) and DarwinLM
(https://arxiv.org/abs/2502.07780) do the same without the ridge. No bias and no tensor is added.

λ is chosen for each projection by the domains of the calibration text: the one that loses least on a domain that was
left out of the fit.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from compressors import cached
from compressors.errors import CheckpointError
from compressors.files import written_whole
from compressors.model.checkpoint import Checkpoint, LazyTensor
from compressors.model.family import Family
from compressors.statistics.second_moments import Moment, Moments, input_of, mixed

STRENGTHS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)  # λ over the median of diag H[S, S]
VERSION = 2  # increase it when the same cut would be repaired differently
ROWS = 256  # about the number of outputs that choose the strength
NO_REPAIR = float("inf")


def take_over(
    cut: Checkpoint,
    before: Checkpoint,
    family: Family,
    parts: Sequence[str],
    kept: Sequence[torch.Tensor],
    moments: Moments,
    device: str = "cpu",
) -> Checkpoint:
    """Return `cut` with the projections `parts` of every layer repaired when they are read.

    Args:
        cut: The cut checkpoint.
        before: The checkpoint before the cut.
        family: The family of both.
        parts: The projections to repair.
        kept: The kept inputs [|S|] of these projections, by layer.
        moments: The second moments of the layers of `before`.
        device: The device of the arithmetic.
    """
    tensors = dict(cut.tensors)
    for layer, index in enumerate(kept):
        for part in parts:
            name = f"{family.in_layer(layer, part)}.weight"
            stands = input_of(family, part)
            tensors[name] = _lazily(before.tensors[name], tensors[name], index, moments, layer, stands, device)
    return dataclasses.replace(cut, tensors=tensors)


def _lazily(
    whole: LazyTensor, cut: LazyTensor, kept: torch.Tensor, moments: Moments, layer: int, part: str, device: str
) -> LazyTensor:
    def load() -> torch.Tensor:
        weight, index = whole.load().to(device), kept.to(device)

        def find() -> float:
            return strength(weight, index, moments.of(layer, part, device))

        factor = moments.strength
        if factor is None:
            factor = _remembered(moments, layer, part, weight, kept, find)
        return ridge(weight, index, moments.mixed(layer, part, device).second, factor).to(whole.dtype).cpu()

    return LazyTensor((whole.shape[0], len(kept)), cut.dtype, load)


def _remembered(
    moments: Moments, layer: int, part: str, weight: torch.Tensor, kept: torch.Tensor, find: Callable[[], float]
) -> float:
    """Return a strength from its file, or find and keep it: that takes several times as long as the repair."""
    key = hashlib.sha256(f"{VERSION} {moments.layers[layer]} {part} {tuple(weight.shape)} {kept.tolist()}".encode())
    key.update(weight.float().sum(0)[:64].cpu().numpy().tobytes())
    return cached.kept(
        moments.path / "strengths" / key.hexdigest()[:24], _read_strength, lambda path: _keep_strength(path, find())
    )


def _read_strength(path: Path) -> float:
    cached.require_regular(path)
    factor = float(path.read_text())
    if factor not in (*STRENGTHS, NO_REPAIR):
        raise ValueError(f"it holds {factor}")
    return factor


def _keep_strength(path: Path, factor: float) -> None:
    with written_whole(path) as scratch:
        scratch.write_text(repr(factor))


def strength(weight: torch.Tensor, kept: torch.Tensor, moments: Mapping[str, Moment]) -> float:
    """Return the factor of λ that loses least on domains left out of the fit in turn; NO_REPAIR if none gains.

    With a single domain it is the middle of STRENGTHS.
    """
    if len(moments) < 2:
        return STRENGTHS[len(STRENGTHS) // 2]
    weight = weight[:: max(1, len(weight) // ROWS)]
    unrepaired = weight.double()[:, kept]
    judged = []
    for left_out, moment in moments.items():
        whole = max(loss(weight, unrepaired, kept, moment.second), 1e-30)
        judged.append((solver(weight, kept, mixed(moments, without=left_out).second), moment.second, whole))

    def lost(factor: float) -> float:
        return left_of([loss(weight, solve(factor), kept, second) / whole for solve, second, whole in judged])

    factor, least = least_of(STRENGTHS, lost, len(STRENGTHS) // 2)
    return factor if least < 1.0 else NO_REPAIR


def left_of(shares: Sequence[float]) -> float:
    """Return what a fit is judged by, from the share of the loss that it leaves on each text that it did not see.

    That is their mean; but the largest, which is above 1, where a text is worse off than without a repair.
    """
    return max(shares) if max(shares) > 1.0 else sum(shares) / len(shares)


def least_of(factors: Sequence[float], lost: Callable[[float], float], start: int) -> tuple[float, float]:
    """Return (the factor that loses least, its loss), by steps downhill from the factor at `start`.

    A loss on text that was left out falls and then rises as λ grows, so that three or four of the factors are tried.
    """
    known: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in known:
            known[place] = lost(factors[place])
        return known[place]

    place = start
    while True:
        near = [other for other in (place - 1, place + 1) if 0 <= other < len(factors)]
        best = min(near, key=at)
        if not at(best) < at(place):
            return factors[place], at(place)
        place = best


def ridge(weight: torch.Tensor, kept: torch.Tensor, second: torch.Tensor, factor: float) -> torch.Tensor:
    """Return W' [N, |S|] float64 for λ = factor × the median of diag H[S, S]; an infinite factor gives W[:, S]."""
    return weight.double()[:, kept] if factor == NO_REPAIR else solver(weight, kept, second)(factor)


def solver(weight: torch.Tensor, kept: torch.Tensor, second: torch.Tensor) -> Callable[[float], torch.Tensor]:
    """Return a function from λ's factor to W' [N, |S|], float64."""
    weight, second = weight.double(), second.double()
    stay = second[kept][:, kept]  # (S, S)
    gone = removed(kept, weight.shape[1])
    cross = second[kept][:, gone] @ weight[:, gone].T  # (S, N)
    unit = float(stay.diagonal().median().clamp_min(1e-30))

    def solve(factor: float) -> torch.Tensor:
        damped = stay.clone()
        damped.diagonal().add_(factor * unit)
        taken: torch.Tensor = torch.cholesky_solve(cross, cholesky(damped)).T
        return weight[:, kept] + taken

    return solve


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Return the Cholesky factor of a matrix that float32 sums may have left slightly short of positive definite.

    Raises:
        CheckpointError: When a damping of 1e-5 of the mean diagonal does not make it positive definite.
    """
    for damping in (0.0, 1e-9, 1e-7, 1e-5):
        damped = matrix.clone()
        damped.diagonal().add_(damping * matrix.diagonal().mean())
        result = torch.linalg.cholesky_ex(damped)
        if not int(result.info):
            factor: torch.Tensor = result.L
            return factor
    raise CheckpointError(
        "repair: a second moment is not positive definite, so the weights are broken or its file is damaged; delete "
        "outputs/calibration, and it is collected again"
    )


def loss(weight: torch.Tensor, made: torch.Tensor, kept: torch.Tensor, second: torch.Tensor) -> float:
    """Return E‖W x − W' x_S‖², the mean over tokens."""
    error = weight.float().clone()
    error[:, kept] -= made.float()
    return float(((error @ second.float()) * error).sum(dtype=torch.float64))


def removed(kept: torch.Tensor, width: int) -> torch.Tensor:
    """Return the inputs that are not in `kept`, ascending."""
    mask = torch.ones(width, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask.nonzero()[:, 0]
