"""Repair through the whole model: layer after layer, what writes to the residual stream is refit so that the stream is
the base model's again.

Symbols: r the base model's residual stream and r' the cut model's, x' [K] what a projection W' [N, K] reads in the cut
model, whose layers before it have been repaired already, t = r − r' what W' x' has to add there.

    W' = W + B (A + λ I)⁻¹,   A = E[w x' x'ᵀ],   B = E[w (t − W x') x'ᵀ],   w = 1 / mean(r²)

minimises E w ‖W' x' − t‖² + λ ‖W' − W‖². A token counts by what is wrong relative to its stream, since every reader
divides by that: the massive first tokens (https://arxiv.org/abs/2402.17762) crush nothing. Refit is what lost inputs;
and where layers were dropped, the last projection before the gap aims at the stream behind it. Where a norm follows the
projection (EXAONE 4, Gemma), t is carried back through it. After a cut of hidden_size, q, k, v, gate and up are refit
too, toward the base model's outputs. Closed-form updates that see what the cut model really reads, with the base
model's output as their target, are those of GPTAQ (https://arxiv.org/abs/2504.02692) for quantization; no bias and no
tensor is added.

λ is chosen for each projection by the domains of the calibration text, as in `compressors.methods.repair`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compressors import safetensors_file
from compressors.checkpoint import Checkpoint, LazyTensor
from compressors.family import Family
from compressors.layerwise import Layers
from compressors.moments import Moments
from compressors.streams import Streams, Told

STRENGTHS = (1e-3, 1e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)  # λ over the median of diag A
ROWS = 128  # about as many outputs choose the strength


def take_over(
    cut: Checkpoint,
    base: Checkpoint,
    family: Family,
    layers: Sequence[int],
    dimensions: torch.Tensor | None,
    kept: Mapping[str, Sequence[torch.Tensor]],
    moments: Moments,
    say: Callable[[str], None] = lambda _: None,
) -> Checkpoint:
    """`cut` with its weights refit when one of them is first read; kept beside the moments, on whose text they are fit.

    kept: of each projection that lost inputs, those that stay, by layer.
    """
    parts = refit_parts(family, layers, int(base.config["num_hidden_layers"]), kept, dimensions)
    names = [
        f"{family.in_layer(new, part)}.weight" for new, groups in enumerate(parts) for group in groups for part in group
    ]

    @functools.cache
    def file() -> Path:
        path = moments.path / f"stream-{_key(cut, layers, kept)}.safetensors"
        if not path.is_file():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            made, _ = refit(
                cut,
                base,
                family,
                layers,
                parts,
                dimensions,
                moments.windows(),
                device,
                progress=lambda done, total: say(f"repair, layer {done} of {total}"),
            )
            with tempfile.TemporaryDirectory(dir=moments.path) as scratch:
                written = Path(scratch, path.name)
                save_file(made, written)
                written.replace(path)
        return path

    def lazily(name: str) -> LazyTensor:
        there = cut.tensors[name]
        return LazyTensor(there.shape, there.dtype, lambda: safetensors_file.loader(file(), name)())

    return dataclasses.replace(cut, tensors={**cut.tensors, **{name: lazily(name) for name in names}})


def _key(cut: Checkpoint, layers: Sequence[int], kept: Mapping[str, Sequence[torch.Tensor]]) -> str:
    """Of what is cut, and of the norms and biases, which a cut of hidden_size changes."""
    chosen = {part: [index.tolist() for index in of_layer] for part, of_layer in sorted(kept.items())}
    digest = hashlib.sha256(json.dumps([list(layers), chosen]).encode())
    for name in sorted(cut.tensors):
        if len(cut.tensors[name].shape) == 1:
            digest.update(f"{name} {cut.tensors[name].load().double().tolist()}".encode())
    return digest.hexdigest()[:24]


def refit_parts(
    family: Family, layers: Sequence[int], count: int, lost: Collection[str], dimensions: torch.Tensor | None
) -> list[list[tuple[str, ...]]]:
    """By layer, the projections that are refit, those of one input together, in the order of the forward pass.

    lost: o or down, where they lost inputs. What lost none and stands before no gap can't make up for the others: on
    SmolLM2, fits of those left 98.5% to 100% of the loss. With fewer dimensions every projection has lost something.
    """
    if dimensions is not None:
        return [list(family.fused)] * len(layers)
    following = [*layers[1:], count]
    return [
        [
            *([(family.o,)] if family.o in lost else []),
            *([(family.down,)] if family.down in lost or following[new] > old + 1 else []),
        ]
        for new, old in enumerate(layers)
    ]


def refit(
    cut: Checkpoint,
    base: Checkpoint,
    family: Family,
    layers: Sequence[int],
    parts: Sequence[Sequence[tuple[str, ...]]],
    dimensions: torch.Tensor | None,
    windows: Mapping[str, Sequence[Sequence[int]]],
    device: str = "cpu",
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Strength]]:
    """(name → weight, in the dtype of `cut` on the CPU; name → how it was found), of every projection that is refit.

    layers: of the base model, those that stay. parts: by layer, see `refit_parts`. dimensions: of the residual stream,
    those that stay; None: all of them. windows: by domain. Both models are in memory, and the streams of all windows.
    """
    dtype = torch.float32 if device == "cpu" else None
    whole, small = base.to_model(device, dtype), cut.to_model(device, dtype)
    modules = dict(small.named_modules())
    streams = [
        Streams(Layers(whole, family, those, batch), Layers(small, family, those, batch), family, dimensions)
        for those in windows.values()
    ]
    weights: dict[str, torch.Tensor] = {}
    strengths: dict[str, Strength] = {}

    def fit(layer: int, parts: Sequence[str], told: Callable[[Streams], Told]) -> None:
        fits: dict[str, list[Fit]] = {part: [] for part in parts}  # by domain
        for domain in streams:
            sums = [Fit() for _ in parts]
            for x, weight, missing in told(domain):
                for one, of_part in zip(sums, missing, strict=True):
                    one.add(x, of_part, weight)
            for part, one in zip(parts, sums, strict=True):
                fits[part].append(one)
        for part, by_domain in fits.items():
            delta, found = change(by_domain)
            name = f"{family.in_layer(layer, part)}.weight"
            module = modules[family.in_layer(layer, part)]
            module.weight.data = (module.weight.data.double() + delta).to(module.weight.dtype)
            weights[name], strengths[name] = module.weight.data.to(cut.tensors[name].dtype).cpu(), found

    following = [*layers[1:], int(base.config["num_hidden_layers"])]
    last = max((new for new, groups in enumerate(parts) if groups), default=-1)
    alike = dimensions is None and layers[0] == 0  # the streams, so far
    for new, old in enumerate(layers[: last + 1]):
        alike = alike and not parts[new]
        for domain in streams:
            domain.advance_base(range(old) if new == 0 else (), old, range(old + 1, following[new]), look=not alike)
        for group in parts[new]:
            if group in ((family.o,), (family.down,)):
                fit(new, group, functools.partial(Streams.of_writer, layer=new, part=group[0]))
            else:
                fit(new, group, functools.partial(Streams.of_readers, layer=new, parts=group))
        for domain in streams:
            domain.advance_cut(new, alike=alike)
        if progress is not None:
            progress(new + 1, last + 1)
    return weights, strengths


class Fit:
    """Sums over the tokens of a domain: A [K, K], B [N, K], w (t − W x')² [N]; float32 on the model's device."""

    def __init__(self, second: Any = 0.0, cross: Any = 0.0, square: Any = 0.0, tokens: int = 0) -> None:
        self.second, self.cross, self.square, self.tokens = second, cross, square, tokens

    def add(self, x: torch.Tensor, missing: torch.Tensor, weight: torch.Tensor) -> None:
        """x [B, T, K], missing = t − W x [B, T, N], weight [B, T, 1]."""
        root = weight.float().sqrt()
        x, missing = (x.float() * root).flatten(0, 1), (missing.float() * root).flatten(0, 1)
        self.second = self.second + x.T @ x
        self.cross = self.cross + missing.T @ x
        self.square = self.square + missing.square().sum(0)
        self.tokens += len(x)

    def means(self) -> Fit:
        return Fit(self.second / self.tokens, self.cross / self.tokens, self.square / self.tokens, 1)


@dataclasses.dataclass(frozen=True)
class Strength:
    """factor: λ over the median of diag A, infinite where no fit gains. left: the share of the loss that is left on
    domains left out of the fit."""

    factor: float
    left: float


def change(fits: Sequence[Fit]) -> tuple[torch.Tensor, Strength]:
    """(W' − W [N, K] float64, how strongly it was held back), from the sums of each domain.

    Zero where no strength gains on the domains that it wasn't fitted to.
    """
    means = [fit.means() for fit in fits]
    some = slice(None, None, max(1, len(means[0].cross) // ROWS))
    lost = dict.fromkeys(STRENGTHS, 0.0)
    for left_out, one in enumerate(means):
        others = [other for place, other in enumerate(means) if place != left_out] or means
        solve = _solver(others, some)
        cross, square = one.cross[some], max(float(one.square[some].sum()), 1e-30)
        for factor in STRENGTHS:
            made = solve(factor).float()
            gained = 2 * (made * cross).sum() - ((made @ one.second) * made).sum()
            lost[factor] += 1 - float(gained) / square
    best = min(lost, key=lambda factor: lost[factor])
    left = lost[best] / len(means)
    if not left < 1.0:
        return torch.zeros_like(means[0].cross, dtype=torch.float64), Strength(float("inf"), 1.0)
    return _solver(means)(best), Strength(best, left)


def _solver(sums: Sequence[Fit], rows: slice = slice(None)) -> Callable[[float], torch.Tensor]:
    """λ's factor → B (A + λ I)⁻¹ of these outputs, float64; domains count the same."""
    second = torch.stack([one.second for one in sums]).mean(0).double()
    cross = torch.stack([one.cross[rows] for one in sums]).mean(0).double()
    unit = second.diagonal().median().clamp_min(1e-30)
    eye = torch.eye(len(second), dtype=second.dtype, device=second.device)

    def solve(factor: float) -> torch.Tensor:
        made: torch.Tensor = torch.cholesky_solve(cross.T, torch.linalg.cholesky(second + factor * unit * eye)).T
        return made

    return solve
