"""Repair a cut model layer after layer: refit what writes to the residual stream to restore the base model's stream.

Symbols: r the base model's residual stream, r' the cut model's, x' [K] what a projection W' [N, K] of the cut model
reads. Its earlier layers are repaired already. t = r − r' is what W' x' has to add.

    W' = W + B (A + λ I)⁻¹,   A = E[w x' x'ᵀ],   B = E[w (t − W x') x'ᵀ],   w = 1 / √mean(r²)

minimises E w ‖W' x' − t‖² + λ ‖W' − W‖². Every reader divides by √mean(r²), and a few massive tokens
(https://arxiv.org/abs/2402.17762) hold nearly all of an unweighted error. With w = 1 they outweigh the others. With the
relative error's 1 / mean(r²) a few windows of SmolLM2 lost much; with the square root none does.

Refit are projections that lost inputs, and down_proj where o_proj did: it reads what came of the lost heads, and can
add part of it. Where layers were dropped, the last projection before the gap aims at the stream after it. Where a norm
follows the projection (EXAONE 4, Gemma), t is carried back through the norm. Where no layer was dropped, q, k, v, gate
and up are refit too if the stream they read differs from the base model's. They aim at the base model's outputs, with
w = 1 / the mean square of what the base model reads there: all of r' tells more of r than the inputs of one projection.

GPTAQ (https://arxiv.org/abs/2504.02692) makes such closed-form updates for quantization: they see what the compressed
model really reads, and aim at the base model's output. No bias and no tensor is added.

λ is chosen for each projection on calibration text that the fit did not see: `changes`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from compressors.device import batch_of, compute_dtype, home, release, tensor_cores
from compressors.errors import CheckpointError
from compressors.methods.kept_fits import fitted, fitted_in_memory
from compressors.methods.repair import cholesky, least_of, left_of
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family
from compressors.statistics.layerwise import Called, Layers
from compressors.statistics.residual_streams import Stays, Streams
from compressors.statistics.second_moments import Moments, weighted

STRENGTHS = (1e-3, 1e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)  # λ over the median of diag A
VERSION = 10  # increase it when the same cut would be refit differently
ROWS = 128  # about the number of outputs that choose the strength
EXPLORED = 4  # λ of every so many layers is looked for; those between take it over, if it gains there


def take_over(
    cut: Checkpoint,
    base: Checkpoint,
    family: Family,
    stays: Stays,
    moments: Moments,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
    *,
    before: str | None = None,
) -> Checkpoint:
    """Return `cut` with the weights to repair replaced by ones that are refit when one of them is first read.

    The fit uses the text of `moments`, and its result is kept in a file in their directory; the last FILES are kept.
    With a limited number of tokens it stays in memory.

    Args:
        cut: The cut checkpoint.
        base: The base model's checkpoint.
        family: The family of both.
        stays: What the cut kept of `base`.
        moments: The second moments, for their text and directory.
        device: The device that both models run on.
        say: A function that is called with what is being done.
        before: Names what has repaired `cut` already; None: nothing has.

    Raises:
        CheckpointError: On reading a weight, when activations are not finite.
        MachineError: On reading a weight, when the file can't be written.
    """
    parts = refit_parts(family, stays, int(base.config["num_hidden_layers"]))
    names = [
        f"{family.in_layer(new, part)}.weight" for new, groups in enumerate(parts) for group in groups for part in group
    ]

    def progress(done: int, total: int) -> None:
        say(f"repair, layer {done} of {total}")

    def fit() -> dict[str, torch.Tensor]:
        say("repair: reading both models")
        windows, shares = moments.few_windows(), moments.shares()
        refitted = refit(cut, base, family, stays, parts, windows, device, progress=progress, shares=shares)[0]
        release(device)
        return refitted

    def key() -> str:
        return _key(cut, stays, device, moments.weights, before)

    if moments.tokens is not None:
        return fitted_in_memory(cut, names, fit)
    return fitted(cut, names, moments.path, "stream", key, fit, say)


def _key(cut: Checkpoint, stays: Stays, device: str, weights: Sequence[float] | None, before: str | None) -> str:
    """Return a digest of what is cut, how it is fit, and the norms and biases, which a cut of hidden_size changes."""
    chosen = {part: [index.tolist() for index in of_layer] for part, of_layer in sorted(stays.inputs.items())}
    more = [each for each in (weights, before) if each]
    how = [VERSION, STRENGTHS, ROWS, device, list(stays.layers), chosen, *more]
    digest = hashlib.sha256(json.dumps(how).encode())
    for name in sorted(cut.tensors):
        if len(cut.tensors[name].shape) == 1:
            digest.update(f"{name} {cut.tensors[name].load().double().tolist()}".encode())
    return digest.hexdigest()[:24]


def refit_parts(family: Family, stays: Stays, count: int) -> list[list[tuple[str, ...]]]:
    """Return the groups of projections to refit by layer, in the order of the forward pass; a group has one input.

    Refit are projections that lost inputs, and what writes before a gap; with fewer dimensions all have lost some.
    Where o_proj did, down_proj is refit too: with one of two key/value groups PerfNorm of Qwen2.5-Coder-1.5B rises from
    .614 to .717 by that, with 26 of 28 layers besides from .143 to .492, with 8 of 12 query heads from .801 to .889.

    If no layer is dropped, also what reads a stream that differs from the base model's. On SmolLM2 that raised PerfNorm
    from .811 to .822 for 2 of 3 key/value groups. After a gap it lowered it from .865 to .855.

    Args:
        family: The family of the model.
        stays: What the cut kept of the base model.
        count: The number of layers of the base model.
    """
    if stays.dimensions is not None:
        return [list(family.fused)] * len(stays.layers)
    readers, o, gated, down = family.fused
    following = [*stays.layers[1:], count]
    whole, differs = len(stays.layers) == count, False
    by_layer = []
    for new, old in enumerate(stays.layers):
        parts = [readers] if whole and differs else []
        if family.o in stays.inputs:
            parts, differs = [*parts, o], True
        if whole and differs:
            parts.append(gated)
        if family.down in stays.inputs or family.o in stays.inputs or following[new] > old + 1:
            parts, differs = [*parts, down], True
        by_layer.append(parts)
    return by_layer


def refit(
    cut: Checkpoint,
    base: Checkpoint,
    family: Family,
    stays: Stays,
    parts: Sequence[Sequence[tuple[str, ...]]],
    windows: Mapping[str, Sequence[Sequence[int]]],
    device: str = "cpu",
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    shares: Mapping[str, float] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Strength]]:
    """Refit the projections `parts` of `cut`, layer after layer; both models and the streams of all windows in memory.

    Args:
        cut: The cut checkpoint.
        base: The base model's checkpoint.
        family: The family of both.
        stays: What the cut kept of `base`.
        parts: The groups of projections to refit, by layer of `cut`; see `refit_parts`.
        windows: The windows of token ids, by domain.
        device: The device that both models run on.
        batch: The largest number of windows that run at once; None: as many as the device takes well.
        progress: A function that is called with (layers done, layers in all) after each layer.
        shares: How much each domain counts; None: all the same.

    Returns:
        (weight name → weight in the dtype of `cut`, on the CPU; weight name → its `Strength`).

    Raises:
        CheckpointError: When activations are not finite.
    """
    longest = max(len(window) for some in windows.values() for window in some)
    models = _load(cut, base, family, stays, windows, device, batch or batch_of(device, longest), shares)
    layers = stays.layers
    following = [*layers[1:], int(base.config["num_hidden_layers"])]
    last = max((new for new, groups in enumerate(parts) if groups), default=-1)
    alike = stays.dimensions is None and layers[0] == 0  # whether both streams are still the same
    weights: dict[str, torch.Tensor] = {}
    strengths: dict[str, Strength] = {}
    for new, old in enumerate(layers[: last + 1]):
        alike = alike and not parts[new]
        readers = [group[0] for group in parts[new] if not _writes(family, group)]
        skipped = range(old) if new == 0 else ()
        for streams in models.streams:
            streams.advance_base(skipped, old, range(old + 1, following[new]), readers, look=not alike)
        for group in parts[new]:
            jumps = group[0] == family.down and following[new] > old + 1
            for name, (weight, strength) in _refit_group(models, new, group, jumps=jumps).items():
                weights[name], strengths[name] = weight, strength
        for streams in models.streams:
            streams.advance_cut(new, alike=alike)
        if progress is not None:
            progress(new + 1, last + 1)
    return weights, strengths


@dataclasses.dataclass(frozen=True)
class _Models:
    """The cut model in memory, and both models' streams on each domain's windows.

    Attributes:
        cut: The cut checkpoint.
        family: Its family.
        modules: The modules of the cut model in memory, by name; their weights are replaced as they are refit.
        streams: The streams of both models, an entry per domain.
        weights: How much each domain counts.
        chosen: The strength's factor that each projection had in the layer before; filled as layers are refit.
    """

    cut: Checkpoint
    family: Family
    modules: Mapping[str, Any]
    streams: Sequence[Streams]
    weights: Sequence[float]
    chosen: dict[str, float] = dataclasses.field(default_factory=dict)


def _load(
    cut: Checkpoint,
    base: Checkpoint,
    family: Family,
    stays: Stays,
    windows: Mapping[str, Sequence[Sequence[int]]],
    device: str,
    batch: int,
    shares: Mapping[str, float] | None,
) -> _Models:
    dtype = compute_dtype(device)
    whole, small = base.to_model(device, dtype), cut.to_model(device, dtype)
    called: tuple[Called, Called] = ({}, {})
    streams = []
    tokens = sum(len(window) for some in windows.values() for window in some)
    widths = 5 * int(base.config["hidden_size"]) + int(cut.config["intermediate_size"])  # see Streams
    kept_at = home(device, tokens * widths * whole.dtype.itemsize)
    for some in windows.values():
        together = max(1, min(batch, len(some) // 2))  # two batches at least: one is kept from the fit
        of_base = Layers(whole, family, some, together, called[0])
        of_cut = Layers(small, family, some, together, called[1])
        streams.append(Streams(of_base, of_cut, family, stays, kept_at))
    weights = [1.0 if shares is None else shares[name] for name in windows]
    return _Models(cut, family, dict(small.named_modules()), streams, weights)


def _writes(family: Family, group: Sequence[str]) -> bool:
    """Return whether a group of projections with one input writes to the residual stream."""
    return group[0] in (family.o, family.down)


def _refit_group(
    models: _Models, layer: int, group: Sequence[str], *, jumps: bool
) -> dict[str, tuple[torch.Tensor, Strength]]:
    """Refit the projections of one input in the model in memory; return their new weights by name.

    One that `jumps` aims at the stream after a gap: it has much more to add than those of other layers, so that its
    strength is its own.
    """
    refitted = {}
    halves, rows = _sums(models, layer, group)
    sums = [tensor for pair in halves for half in pair if half.tokens for tensor in (half.second, half.cross)]
    if not all(torch.isfinite(tensor).all() for tensor in sums):
        raise CheckpointError(
            f"repair: the inputs or outputs of {models.family.in_layer(layer, group[0])}.weight are NaN or infinite; "
            "the weights are broken, copy them again"
        )
    taken = [None if jumps or layer % EXPLORED == 0 else models.chosen.get(part) for part in group]
    for part, (delta, strength) in zip(group, changes(halves, rows, taken), strict=True):
        if strength.factor in STRENGTHS and not jumps:
            models.chosen[part] = strength.factor
        module_name = models.family.in_layer(layer, part)
        module = models.modules[module_name]
        weight = (module.weight.data.double() + delta).to(models.cut.tensors[f"{module_name}.weight"].dtype)
        module.weight.data = weight.to(module.weight.dtype)  # later layers are fit to what will be written
        refitted[f"{module_name}.weight"] = weight.cpu(), strength
    return refitted


def _sums(models: _Models, layer: int, group: Sequence[str]) -> tuple[list[tuple[Fit, Fit]], list[int]]:
    """Return the sums over the two halves of each domain's batches, and how many outputs each projection has."""
    fits: list[tuple[Fit, Fit]] = []
    rows: list[int] = []
    for streams, share in zip(models.streams, models.weights, strict=True):
        pair = Fit(share=share), Fit(share=share)
        told = streams.of_writer(layer, group[0]) if _writes(models.family, group) else streams.of_readers(layer, group)
        for place, (x, weight, missing) in enumerate(told):
            rows = [error.shape[-1] for error in missing]
            pair[2 * place >= len(streams.cut.hidden)].add(x, torch.cat(list(missing), dim=-1), weight)
        fits.append(pair)
    return fits, rows


class Fit:
    """Fit adds up a domain's tokens: A [K, K], B [N, K], w (t − W x')² [N]; float32 on the model's device.

    Attributes:
        second: A.
        cross: B.
        square: The weighted squares of what is missing.
        tokens: The number of tokens.
        share: How much the domain counts.
    """

    def __init__(
        self, second: Any = 0.0, cross: Any = 0.0, square: Any = 0.0, tokens: int = 0, share: float = 1.0
    ) -> None:
        """Start from these sums."""
        self.second, self.cross, self.square, self.tokens, self.share = second, cross, square, tokens, share

    def add(self, x: torch.Tensor, missing: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the inputs x [B, T, K], what is missing t − W x [B, T, N], and the tokens' weights [B, T, 1]."""
        root = weight.float().sqrt()
        x, missing = (x.float() * root).flatten(0, 1), (missing.float() * root).flatten(0, 1)
        with tensor_cores(x.device):
            self.second = self.second + x.T @ x
            self.cross = self.cross + missing.T @ x
        self.square = self.square + missing.square().sum(0)
        self.tokens += len(x)

    def __add__(self, other: Fit) -> Fit:
        """Return the sums over both."""
        return Fit(
            self.second + other.second,
            self.cross + other.cross,
            self.square + other.square,
            self.tokens + other.tokens,
            self.share,
        )

    def means(self) -> Fit:
        """Return the means over tokens."""
        return Fit(self.second / self.tokens, self.cross / self.tokens, self.square / self.tokens, 1, self.share)


@dataclasses.dataclass(frozen=True)
class Strength:
    """Strength says how strongly a fit was held back, and what it gains.

    Attributes:
        factor: λ over the median of diag A; infinite where no fit gains.
        left: The share of the loss that is left on text that the fit did not see.
    """

    factor: float
    left: float


def changes(
    fits: Sequence[Sequence[Fit]], rows: Sequence[int], taken: Sequence[float | None] | None = None
) -> list[tuple[torch.Tensor, Strength]]:
    """Return (W' − W [N, K] float64, its strength) of projections with one input, from each domain's two halves.

    λ is the one of STRENGTHS that loses least on text that the fit did not see, for each projection by itself. Each
    domain in turn is left out, and so is the second half of each, with the same weight. So the fit must not lose on
    another kind of text, nor on more of the same. The change is zero where no λ gains. λ is the middle of STRENGTHS for
    a single window, where no text is unseen.

    Args:
        fits: The sums of each domain's halves, over the outputs of all projections, one after the other.
        rows: The number of outputs N of each projection.
        taken: For each projection a factor of λ to take if it gains, None to look for one; None: look for all.
    """
    halves = [[half.means() for half in of_domain if half.tokens] for of_domain in fits]
    whole = [sum(of_domain[1:], of_domain[0]).means() for of_domain in fits]
    unseen = []  # (fitted to, judged on)
    for place, of_domain in enumerate(halves):
        others = whole[:place] + whole[place + 1 :]
        if others:
            unseen.append((others, whole[place]))
        if len(of_domain) > 1:
            unseen.append(([*others, of_domain[0]], of_domain[1]))
    shared = len(rows) > 1
    folds = [(_Solver(fitted, shared=shared), judged) for fitted, judged in unseen]
    solve, ends = _Solver(whole, shared=shared), list(itertools.accumulate(rows, initial=0))
    first = taken or [None] * len(rows)
    return [_change(folds, solve, slice(*ends[place : place + 2]), first[place]) for place in range(len(rows))]


def _change(
    folds: Sequence[tuple[_Solver, Fit]], solver: _Solver, outputs: slice, taken: float | None
) -> tuple[torch.Tensor, Strength]:
    middle = len(STRENGTHS) // 2
    if not folds:
        return solver(STRENGTHS[middle], outputs), Strength(STRENGTHS[middle], 1.0)
    some = slice(outputs.start, outputs.stop, max(1, (outputs.stop - outputs.start) // ROWS))

    def lost(factor: float) -> float:
        shares = []
        for solve, judged in folds:
            square = max(float(judged.square[some].sum()), 1e-30)
            delta = solve(factor, some).float()
            gained = 2 * (delta * judged.cross[some]).sum() - ((delta @ judged.second) * delta).sum()
            shares.append(1 - float(gained) / square)
        return left_of(shares, [judged.share for _, judged in folds])

    best, left = (taken, lost(taken)) if taken is not None else (0.0, 1.0)
    if not left < 1.0:
        best, left = least_of(STRENGTHS, lost, middle)
    if not left < 1.0:
        return torch.zeros_like(solver.cross(outputs)), Strength(float("inf"), 1.0)
    return solver(best, outputs), Strength(best, left)


class _Solver:
    """_Solver gives B (A + λ I)⁻¹ of some outputs, float64; domains count by their shares.

    Args:
        sums: The means of each domain that the fit sees.
        shared: Whether several projections are fit to A, so that its factors are kept.
    """

    def __init__(self, sums: Sequence[Fit], *, shared: bool) -> None:
        self._sums, self._shared = sums, shared
        self._factors: dict[float, torch.Tensor] = {}

    def __call__(self, factor: float, outputs: slice) -> torch.Tensor:
        """Return the change for λ = factor × the median of diag A."""
        delta: torch.Tensor = torch.cholesky_solve(self.cross(outputs).T, self._factored(factor)).T
        return delta

    def cross(self, outputs: slice) -> torch.Tensor:
        """Return B [N, K] of these outputs."""
        return self._mean([one.cross[outputs] for one in self._sums]).double()

    def _mean(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return weighted(tensors, [one.share for one in self._sums])

    def _factored(self, factor: float) -> torch.Tensor:
        if factor in self._factors:
            return self._factors[factor]
        second = self._mean([one.second for one in self._sums]).double()
        unit = second.diagonal().median().clamp_min(1e-30)
        second.diagonal().add_(factor * unit)
        factored = cholesky(second)
        if self._shared:
            self._factors[factor] = factored
        return factored
