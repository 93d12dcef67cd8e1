"""Repair in closed form: the weights that stay take over what was cut, by least squares on the calibration text.

Symbols: W [N, K] a projection, S the inputs that stay and R those that go, H [K, K] the second moment of its input.

    W' = W[:, S] + W[:, R] H[R, S] (H[S, S] + λ I)⁻¹

minimises E‖W x − W' x_S‖² + λ ‖W' − W[:, S]‖²: a ridge toward the weights that stay, not toward zero, so that what the
text does not determine is left alone. It is what ZipLM (https://arxiv.org/abs/2302.04089) and DarwinLM
(https://arxiv.org/abs/2502.07780) do without the ridge. It adds no bias and no tensor.

λ is chosen for each projection by the domains of the calibration text: the one that loses least on a domain that was
not fitted to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from compressors.errors import CheckpointError
from compressors.model.checkpoint import Checkpoint, LazyTensor
from compressors.model.family import Family
from compressors.statistics.second_moments import Moment, Moments, input_of, mixed

STRENGTHS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)  # λ over the median of diag H[S, S]
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
    """The projections `parts` of every layer of `cut`, repaired.

    They read the inputs `kept` [|S|] of those of `before`. moments: of the layers of `before`. device: of the
    arithmetic.
    """
    tensors = dict(cut.tensors)
    for layer, index in enumerate(kept):
        for part in parts:
            name = f"{family.in_layer(layer, part)}.weight"
            stands = input_of(family, part)
            tensors[name] = _lazily(before.tensors[name], tensors[name], index, moments, layer, stands, device)
    return dataclasses.replace(cut, tensors=tensors)


def _lazily(
    whole: LazyTensor, there: LazyTensor, kept: torch.Tensor, moments: Moments, layer: int, part: str, device: str
) -> LazyTensor:
    def load() -> torch.Tensor:
        by_domain = moments.of(layer, part, device)
        weight, index = whole.load().to(device), kept.to(device)
        factor = _remembered(moments, layer, part, weight, kept, lambda: strength(weight, index, by_domain))
        return ridge(weight, index, mixed(by_domain).second, factor).to(whole.dtype).cpu()

    return LazyTensor((whole.shape[0], len(kept)), there.dtype, load)


def _remembered(
    moments: Moments, layer: int, part: str, weight: torch.Tensor, kept: torch.Tensor, find: Callable[[], float]
) -> float:
    """A strength is found once: that takes several times as long as the repair."""
    key = hashlib.sha256(f"{moments.layers[layer]} {part} {tuple(weight.shape)} {kept.tolist()}".encode())
    key.update(weight.float().sum(0)[:64].cpu().numpy().tobytes())
    path = moments.path / "strengths" / key.hexdigest()[:24]
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        factor = find()
    path.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as out:
        out.write(repr(factor))
    Path(out.name).replace(path)
    return factor


def strength(weight: torch.Tensor, kept: torch.Tensor, moments: Mapping[str, Moment]) -> float:
    """λ's factor that loses least on the domains, each left out of the fit in its turn; NO_REPAIR where none gains.

    With one domain it is the middle of STRENGTHS.
    """
    if len(moments) < 2:
        return STRENGTHS[len(STRENGTHS) // 2]
    unrepaired = weight.double()[:, kept]
    lost = dict.fromkeys((*STRENGTHS, NO_REPAIR), 0.0)
    for left_out, moment in moments.items():
        whole = max(loss(weight, unrepaired, kept, moment.second), 1e-30)
        lost[NO_REPAIR] += 1.0
        solve = solver(weight, kept, mixed(moments, without=left_out).second)
        for factor in STRENGTHS:
            lost[factor] += loss(weight, solve(factor), kept, moment.second) / whole
    return min(lost, key=lambda factor: lost[factor])


def ridge(weight: torch.Tensor, kept: torch.Tensor, second: torch.Tensor, factor: float) -> torch.Tensor:
    """W' for λ = factor × the median of diag H[S, S]; infinite: W[:, S]. float64 [N, |S|]."""
    return weight.double()[:, kept] if factor == NO_REPAIR else solver(weight, kept, second)(factor)


def solver(weight: torch.Tensor, kept: torch.Tensor, second: torch.Tensor) -> Callable[[float], torch.Tensor]:
    """λ's factor → W' [N, |S|], float64."""
    weight, second = weight.double(), second.double()
    there = second[kept][:, kept]  # (S, S)
    gone = removed(kept, weight.shape[1])
    cross = second[kept][:, gone] @ weight[:, gone].T  # (S, N)
    unit = float(there.diagonal().median().clamp_min(1e-30))

    def solve(factor: float) -> torch.Tensor:
        damped = there + factor * unit * torch.eye(len(kept), dtype=there.dtype, device=there.device)
        taken: torch.Tensor = torch.cholesky_solve(cross, cholesky(damped)).T
        return weight[:, kept] + taken

    return solve


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Of a matrix that float32 sums may have left a little short of positive definite."""
    unit = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) * matrix.diagonal().mean()
    for damping in (0.0, 1e-9, 1e-7, 1e-5):
        found = torch.linalg.cholesky_ex(matrix + damping * unit)
        if not int(found.info):
            factor: torch.Tensor = found.L
            return factor
    raise CheckpointError(
        "repair: a second moment is not positive definite: the weights before it are broken, or its file is damaged; "
        "delete outputs/calibration, it is made again"
    )


def loss(weight: torch.Tensor, made: torch.Tensor, kept: torch.Tensor, second: torch.Tensor) -> float:
    """E‖W x − W' x_S‖², the mean over tokens."""
    error = weight.float().clone()
    error[:, kept] -= made.float()
    return float(((error @ second.float()) * error).sum(dtype=torch.float64))


def removed(kept: torch.Tensor, width: int) -> torch.Tensor:
    """The inputs that are not in `kept`, ascending."""
    mask = torch.ones(width, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask.nonzero()[:, 0]
