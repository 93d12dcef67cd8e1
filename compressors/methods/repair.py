"""Repair in closed form: the kept weights take over what was cut, by least squares on the calibration text.

Symbols: W [N, K] a projection, S its kept inputs and R the removed ones, H [K, K] the second moment of its input.

    W' = W[:, S] + W[:, R] H[R, S] (H[S, S] + λ I)⁻¹

minimises E‖W x − W' x_S‖² + λ ‖W' − W[:, S]‖². The ridge pulls toward the kept weights and not toward zero, so what the
text does not determine is left alone. ZipLM (https://arxiv.org/abs/2302.04089) and DarwinLM
(https://arxiv.org/abs/2502.07780) do the same without the ridge. No bias and no tensor is added.

λ is chosen by the domains of the calibration text: the one that loses least on a domain that was left out of the fit.
It is looked for in every EXPLORED-th layer. A layer between takes over what the same projection has there, if it gains.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
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
VERSION = 3  # increase it when the same cut would be repaired differently
ROWS = 128  # about the number of outputs that choose the strength
EXPLORED = 4
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
    for part in parts:
        names = [f"{family.in_layer(layer, part)}.weight" for layer in range(len(kept))]
        of_part = _Part(input_of(family, part), [before.tensors[name] for name in names], kept, moments, device)
        for layer, name in enumerate(names):
            tensors[name] = LazyTensor(
                (before.tensors[name].shape[0], len(kept[layer])),
                cut.tensors[name].dtype,
                functools.partial(of_part.repaired, layer),
            )
    return dataclasses.replace(cut, tensors=tensors)


@dataclasses.dataclass(frozen=True)
class _Part:
    """_Part repairs one projection of every layer when its weight is read.

    Attributes:
        reads: The projection that stands for its input in the moments.
        whole: Its weights [N, K] before the cut, by layer.
        kept: Its kept inputs [|S|], by layer.
        moments: The second moments of the layers.
        device: The device of the arithmetic.
    """

    reads: str
    whole: Sequence[LazyTensor]
    kept: Sequence[torch.Tensor]
    moments: Moments
    device: str

    def repaired(self, layer: int) -> torch.Tensor:
        """Return W' [N, |S|] of a layer in the dtype of W, on the CPU."""
        weight = self._weight(layer)
        factor = self.moments.strength
        if factor is None:
            factor = self._strength(layer, weight)
        second = self.moments.mixed(layer, self.reads, self.device).second
        made = ridge(weight, self.kept[layer].to(self.device), second, factor)
        return made.to(self.whole[layer].dtype).cpu()

    def _weight(self, layer: int) -> torch.Tensor:
        return self.whole[layer].load().to(self.device)

    def _strength(self, layer: int, weight: torch.Tensor) -> float:
        """Return a layer's strength from its file, or find and keep it: that takes longer than the repair."""
        explored = layer - layer % EXPLORED
        of_layers = [(self.moments.layers[one], self.kept[one].tolist()) for one in {explored, layer}]
        named = [VERSION, self.reads, weight.shape, sorted(of_layers), self.moments.weights]
        key = hashlib.sha256(json.dumps(named).encode())
        key.update(weight.float().sum(0)[:64].cpu().numpy().tobytes())

        def keep(path: Path) -> None:
            near = None if layer == explored else self._strength(explored, self._weight(explored))
            domains = self.moments.of(layer, self.reads, self.device)
            _keep_strength(path, strength(weight, self.kept[layer].to(self.device), domains, near))

        return cached.kept(self.moments.path / "strengths" / key.hexdigest()[:24], _read_strength, keep)


def _read_strength(path: Path) -> float:
    cached.require_regular(path)
    factor = float(path.read_text())
    if factor not in (*STRENGTHS, NO_REPAIR):
        raise ValueError(f"it holds {factor}")
    return factor


def _keep_strength(path: Path, factor: float) -> None:
    with written_whole(path) as scratch:
        scratch.write_text(repr(factor))


def strength(
    weight: torch.Tensor, kept: torch.Tensor, moments: Mapping[str, Moment], near: float | None = None
) -> float:
    """Return the factor of λ that loses least on domains left out of the fit in turn; NO_REPAIR if none gains.

    With a single domain it is the middle of STRENGTHS.

    Args:
        weight: W [N, K].
        kept: The kept inputs [|S|].
        moments: The moments of x [K], by domain.
        near: A factor to take if it gains on the domains left out; None or NO_REPAIR: look for one.
    """
    if len(moments) < 2:
        return STRENGTHS[len(STRENGTHS) // 2]
    weight = weight[:: max(1, len(weight) // ROWS)]
    unrepaired = weight.double()[:, kept]
    judged = []
    for left_out, moment in moments.items():
        whole = max(loss(weight, unrepaired, kept, moment.second), 1e-30)
        solve = solver(weight, kept, mixed(moments, without=left_out).second, torch.float32)
        judged.append((solve, moment.second, whole))

    def lost(factor: float) -> float:
        shares = [loss(weight, solve(factor), kept, second) / whole for solve, second, whole in judged]
        return left_of(shares, [moment.weight for moment in moments.values()])

    if near in STRENGTHS and lost(near) < 1.0:
        return near
    factor, least = least_of(STRENGTHS, lost, len(STRENGTHS) // 2)
    return factor if least < 1.0 else NO_REPAIR


def left_of(shares: Sequence[float], weights: Sequence[float]) -> float:
    """Return what a fit is judged by, from the share of the loss that it leaves on each text that it did not see.

    That is their mean by weight; but the largest, which is above 1, where a text is worse off than without a repair.
    """
    mean = sum(share * weight for share, weight in zip(shares, weights, strict=True)) / sum(weights)
    return max(shares) if max(shares) > 1.0 else mean


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


def solver(
    weight: torch.Tensor, kept: torch.Tensor, second: torch.Tensor, dtype: torch.dtype = torch.float64
) -> Callable[[float], torch.Tensor]:
    """Return a function from λ's factor to W' [N, |S|], computed in float64, or in float32 where that can be."""
    weight, second = weight.to(dtype), second.to(dtype)
    stay = second[kept][:, kept]  # (S, S)
    gone = removed(kept, weight.shape[1])
    cross = second[kept][:, gone] @ weight[:, gone].T  # (S, N)
    unit = float(stay.diagonal().median().clamp_min(1e-30))

    def solve(factor: float) -> torch.Tensor:
        damped = stay.clone()
        damped.diagonal().add_(factor * unit)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            lower = cholesky(damped.double())
        taken: torch.Tensor = torch.cholesky_solve(cross.to(lower.dtype), lower).T
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
