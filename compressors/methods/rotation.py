"""Rotate the residual stream into the basis of its principal components before dimensions are cut.

RMSNorm divides by a length, which no rotation changes. Where norms stand only before the blocks (Llama, Qwen), their
gains can be multiplied into what reads from them, and the stream can be written in any orthonormal basis: the model
computes the same. SliceGPT (https://arxiv.org/abs/2401.15024) has a basis for each block and a matrix between two. Here
all layers share one basis, which stock architectures can express.

A norm after a block (EXAONE 4, Gemma) has gains for the stream's own dimensions. They are multiplied into what writes,
before the norm, which then divides by the length of g ⊙ o and not by that of o. A single gain makes up for that in the
mean over tokens. What is left is how much the ratio of the two lengths differs between tokens. On a trained EXAONE 4 of
31M parameters that is 0.3% to 12% by layer. Rotated and uncut, that model is at a KL of 0.011 from the original.

Symbols: E hidden size, x [E] the stream, o [E] a block's output, x̂ = x / √mean(x²), g [E] a norm's gain, Q [E, E] the
basis, whose columns are the components, the largest first:

    embedding' = embedding Q, W' = W diag(g) Q of readers, W' = Qᵀ diag(g / c) W of writers, c = √mean((g ⊙ ô)²)

(without a norm, g = c = 1). The norms' gains become numbers: 1, and c after a block. An lm_head that was tied to the
embedding becomes a matrix of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from compressors import cached
from compressors.device import compute_dtype, release
from compressors.errors import CheckpointError
from compressors.model import cached_tensors
from compressors.model.checkpoint import Checkpoint, LazyTensor
from compressors.model.family import Family
from compressors.statistics.layerwise import Called, Layers

VERSION = 1  # increase it when the same text would give another basis
BASIS = "basis"


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Rotation is the basis of the residual stream and the mean squares in it.

    Attributes:
        basis: Q [E, E], float32, with orthonormal columns.
        mean_square: The name of each norm over the residual width → [E], the mean over tokens of the squared
            coordinates in
            that basis: of x̂, or of g ⊙ ô for a norm after a block.
    """

    basis: torch.Tensor
    mean_square: dict[str, torch.Tensor]


def principal(
    base: Checkpoint,
    family: Family,
    windows: Mapping[str, Sequence[Sequence[int]]],
    path: Path,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> Rotation:
    """Return the principal components of x̂ over all readers, all tokens, and all domains with equal weight.

    They are computed once by a pass of the base model over `windows` and kept in the directory `path`. The pass needs
    E² floats of main memory per norm.

    Args:
        base: The model.
        family: Its family.
        windows: The windows of token ids by domain.
        path: The directory of the file.
        device: The device that runs the model.
        say: A function that is called with what is being done.

    Raises:
        CheckpointError: When activations are not finite.
        MachineError: When the file can't be written.
    """
    hidden = int(base.config["hidden_size"])
    norms = family.residual_norms(int(base.config["num_hidden_layers"]))
    shapes = {BASIS: ((hidden, hidden), torch.float32), **dict.fromkeys(norms, ((hidden,), torch.float32))}

    def read(file: Path) -> Rotation:
        tensors = cached_tensors.read_all(file, shapes)
        return Rotation(tensors.pop(BASIS), tensors)

    def make(file: Path) -> None:
        rotation = _principal(base, family, windows, device, say)
        cached_tensors.keep(file, {BASIS: rotation.basis, **rotation.mean_square}, f"rotation: {file}")
        release(device)

    return cached.kept(
        path / f"rotation-{VERSION}.safetensors",
        read,
        make,
        lambda: say("rotation: waiting for another process that computes it"),
        lock=path / "rotation",
    )


def _principal(
    base: Checkpoint,
    family: Family,
    windows: Mapping[str, Sequence[Sequence[int]]],
    device: str,
    say: Callable[[str], None],
) -> Rotation:
    model = base.to_model(device, dtype=compute_dtype(device))
    called: Called = {}
    streams = [Layers(model, family, some, called=called) for some in windows.values()]
    count = int(base.config["num_hidden_layers"])
    reads = [family.input_norms.get(part, part) for part in (family.q, family.gate)]
    behind = tuple(family.output_norms.values())
    together = torch.zeros(())  # the sum of E[x̂ x̂ᵀ]
    of_norms: dict[str, torch.Tensor] = {}
    for layer in range(count):
        gains = {norm: _gain(base, family, family.in_layer(layer, norm)).to(device) for norm in behind}
        sums = [{part: _Sum(gains.get(part)) for part in (*reads, *behind)} for _ in streams]
        for stream, of_domain in zip(streams, sums, strict=True):
            stream.forward(layer, {part: of_part.add for part, of_part in of_domain.items()})
        means = {part: _mean([of_domain[part] for of_domain in sums]) for part in (*reads, *behind)}
        together = together + means[reads[0]] + means[reads[1]]
        of_norms |= {family.in_layer(layer, norm): means[norm] for norm in family.block_norms}
        say(f"rotation: layer {layer + 1} of {count}")
    last = [_Sum() for _ in streams]
    for stream, of_last in zip(streams, last, strict=True):
        for hidden in stream.hidden:
            of_last.add(hidden.to(device))
    of_norms[family.final_norm] = _mean(last)
    together = together + of_norms[family.final_norm]
    if not all(torch.isfinite(second).all() for second in (together, *of_norms.values())):
        raise CheckpointError(
            "rotation: the base model's activations are NaN or infinite; its weights are broken, copy them again"
        )
    basis = torch.linalg.eigh(together.to(device, torch.float64)).eigenvectors.flip(1).float()
    mean_square = {
        name: ((second.to(device) @ basis) * basis).sum(0).clamp_min(0).cpu() for name, second in of_norms.items()
    }
    return Rotation(basis.cpu(), mean_square)


class _Sum:
    """_Sum adds up Σ x̂ x̂ᵀ, or with a gain g [E] Σ (g ⊙ x̂)(g ⊙ x̂)ᵀ, in float32 on the model's device."""

    def __init__(self, gain: torch.Tensor | None = None) -> None:
        self.gain = gain
        self.second: torch.Tensor | float = 0.0
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add the tokens of x [B, T, E]."""
        x = x.float().flatten(0, -2)
        x = x * x.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
        if self.gain is not None:
            x = x * self.gain
        self.second = self.second + x.T @ x
        self.tokens += len(x)


def _mean(domains: Sequence[_Sum]) -> torch.Tensor:
    return torch.stack([torch.as_tensor(one.second) / one.tokens for one in domains]).mean(0).cpu()


def turn(base: Checkpoint, family: Family, rotation: Rotation | None, device: str = "cpu") -> Checkpoint:
    """Return `base` with its stream in the basis: it computes the same, or nearly where norms stand after its blocks.

    Args:
        base: The model.
        family: Its family.
        rotation: The basis; None: return the right shapes with arbitrary values.
        device: The device of the arithmetic.
    """
    basis = None if rotation is None else rotation.basis.to(device)
    tensors = dict(base.tensors)
    layers = int(base.config["num_hidden_layers"])

    def mean_gain(norm: str) -> float:
        return 1.0 if rotation is None else float(rotation.mean_square[norm].mean().sqrt())

    def turned(name: str, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> LazyTensor:
        lazy = base.tensors[name]
        if basis is None:
            return lazy
        return lazy.map(lambda weight: change(weight.to(device).float(), basis).to(lazy.dtype).cpu())

    def reads(name: str, norm: str | None) -> LazyTensor:
        def change(weight: torch.Tensor, q: torch.Tensor) -> torch.Tensor:  # [N, E]
            return (weight if norm is None else weight * _gain(base, family, norm).to(device)) @ q

        return turned(name, change)

    def writes(name: str, norm: str | None) -> LazyTensor:
        def change(weight: torch.Tensor, q: torch.Tensor) -> torch.Tensor:  # [E, K], or a bias [E]
            if norm is None:
                return q.T @ weight
            relative = (_gain(base, family, norm) / mean_gain(norm)).to(device)
            return (relative[:, None] * q).T @ weight

        return turned(name, change)

    embedding, head = f"{family.embedding}.weight", f"{family.lm_head}.weight"
    tensors[head] = reads(head if head in base.tensors else embedding, family.final_norm)
    tensors[embedding] = reads(embedding, None)
    for layer in range(layers):
        for part in (family.q, family.k, family.v, family.gate, family.up):
            norm = family.input_norms.get(part)
            name = f"{family.in_layer(layer, part)}.weight"
            tensors[name] = reads(name, norm and family.in_layer(layer, norm))
        for part in (family.o, family.down):
            norm = family.output_norms.get(part)
            for name in (f"{family.in_layer(layer, part)}.weight", f"{family.in_layer(layer, part)}.bias"):
                if name in tensors:
                    tensors[name] = writes(name, norm and family.in_layer(layer, norm))
    for norm in family.residual_norms(layers):
        tensors[f"{norm}.weight"] = base.tensors[f"{norm}.weight"].map(_constant(mean_gain(norm) - family.norm_offset))
    return dataclasses.replace(base, config={**base.config, "tie_word_embeddings": False}, tensors=tensors)


def of_inputs(base: Checkpoint, family: Family, basis: torch.Tensor) -> Callable[[int, str], torch.Tensor | None]:
    """Return a function that says how a projection's input changes when the model is rotated.

    It maps (layer of `base`, projection) to T [E, E], where the rotated model reads T x and `base` reads x. It maps to
    None where both read the same. A dimension with a gain of 0 is 0 in x, so nothing is known of it.
    """

    def change(layer: int, part: str) -> torch.Tensor | None:
        if part not in (family.q, family.k, family.v, family.gate, family.up):
            return None
        norm = family.input_norms.get(part)
        if norm is None:
            return basis.T
        gain = _gain(base, family, family.in_layer(layer, norm))
        return basis.T * torch.where(gain == 0, torch.zeros_like(gain), 1 / gain)

    return change


def _gain(base: Checkpoint, family: Family, norm: str) -> torch.Tensor:
    return base.tensors[f"{norm}.weight"].load().float() + family.norm_offset


def _constant(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: torch.full_like(weight, value)
