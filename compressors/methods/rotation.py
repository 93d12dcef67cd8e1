"""Hidden size by principal components: the residual stream is turned into their basis before dimensions go.

RMSNorm divides by a length, which no rotation changes. So where norms stand before the blocks alone (Llama, Qwen),
their gains can be multiplied into what reads from them, and the stream can be written in any orthonormal basis: the
model computes the same (SliceGPT, https://arxiv.org/abs/2401.15024, which has a basis for each block and a matrix
between two; here all layers share one, so that stock architectures have a place for it). A norm behind a block
(EXAONE 4, Gemma) multiplies the stream's own dimensions by its gains, which no basis but theirs lets it do.

Symbols: E hidden size, V vocabulary, x [E] the stream, x̂ = x / √mean(x²), g [E] a norm's gain, Q [E, E] the basis, a
column a component, the largest first:

    embedding' = embedding Q, W' = W diag(g) Q of what reads, W' = Qᵀ W of what writes, lm_head' = lm_head diag(g) Q

and every gain is 1. An lm_head that was tied to the embedding is another matrix then.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compressors.checkpoint import Checkpoint, LazyTensor
from compressors.errors import CheckpointError, InfeasiblePlan
from compressors.family import Family
from compressors.layerwise import Called, Layers
from compressors.lock import alone

VERSION = 1  # raised when the same text would give another basis
BASIS = "basis"


@dataclasses.dataclass(frozen=True)
class Rotation:
    """basis Q [E, E], float32, orthonormal columns. mean_square: by the name of each norm over the residual width, [E],
    the mean over tokens of the squared coordinates of x̂ in that basis."""

    basis: torch.Tensor
    mean_square: dict[str, torch.Tensor]


def check(family: Family) -> None:
    """Raises InfeasiblePlan where the stream can't be turned."""
    if family.output_norms:
        raise InfeasiblePlan(
            f"rotation: pca: {family.model_type} has a norm behind each block ({family.output_norms[family.o]}), whose "
            "gains belong to the stream's own dimensions; choose rotation none"
        )


def principal(
    base: Checkpoint,
    family: Family,
    windows: Mapping[str, Sequence[Sequence[int]]],
    path: Path,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> Rotation:
    """The principal components of x̂ over all norms, all tokens and, each counting the same, all domains of the text.

    Found once by a pass of the base model over `windows` (by domain) and kept in the directory `path`; on the way
    there are E² floats in main memory for each norm. Raises InfeasiblePlan, and CheckpointError when activations are
    not finite or the file can't be written.
    """
    check(family)
    file = path / f"rotation-{VERSION}.safetensors"
    if not file.is_file():
        with alone(path / "rotation", lambda: say("rotation: waiting for another process that finds it")):
            if not file.is_file():
                _keep(file, _principal(base, family, windows, device, say))
    try:
        tensors = load_file(file)
        return Rotation(tensors.pop(BASIS), tensors)
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"rotation {file}: can't be read ({error}); delete it, it is made again") from None


def _principal(
    base: Checkpoint,
    family: Family,
    windows: Mapping[str, Sequence[Sequence[int]]],
    device: str,
    say: Callable[[str], None],
) -> Rotation:
    model = base.to_model(device, dtype=torch.float32 if device == "cpu" else None)
    called: Called = {}
    streams = [Layers(model, family, those, called=called) for those in windows.values()]
    count = int(base.config["num_hidden_layers"])
    seconds: dict[str, torch.Tensor] = {}  # E[x̂ x̂ᵀ] by norm
    for layer in range(count):
        sums = [{norm: _Sum() for norm in family.block_norms} for _ in streams]
        for stream, of_domain in zip(streams, sums, strict=True):
            stream.forward(layer, {norm: of_norm.add for norm, of_norm in of_domain.items()})
        for norm in family.block_norms:
            seconds[family.in_layer(layer, norm)] = _mean([of_domain[norm] for of_domain in sums])
        say(f"rotation: layer {layer + 1} of {count}")
    last = [_Sum() for _ in streams]
    for stream, of_domain_ in zip(streams, last, strict=True):
        for hidden in stream.hidden:
            of_domain_.add(hidden.to(device))
    seconds[family.final_norm] = _mean(last)
    if not all(torch.isfinite(second).all() for second in seconds.values()):
        raise CheckpointError("rotation: the base model's activations are NaN or infinite: its weights are broken")
    together = functools.reduce(torch.add, seconds.values()).to(device, torch.float64)
    basis = torch.linalg.eigh(together).eigenvectors.flip(1).float()
    mean_square = {
        name: ((second.to(device) @ basis) * basis).sum(0).clamp_min(0).cpu() for name, second in seconds.items()
    }
    return Rotation(basis.cpu().contiguous(), mean_square)


class _Sum:
    """Σ x̂ x̂ᵀ in float32 on the model's device."""

    def __init__(self) -> None:
        self.second: torch.Tensor | float = 0.0
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """x [B, T, E]."""
        x = x.float().flatten(0, -2)
        x = x * x.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
        self.second = self.second + x.T @ x
        self.tokens += len(x)


def _mean(domains: Sequence[_Sum]) -> torch.Tensor:
    return torch.stack([torch.as_tensor(one.second) / one.tokens for one in domains]).mean(0).cpu()


def _keep(file: Path, found: Rotation) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".rotation-") as scratch:
            written = Path(scratch, file.name)
            save_file({BASIS: found.basis, **found.mean_square}, written)
            written.replace(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"rotation: {file} can't be written ({error}); free some space") from None


def turn(base: Checkpoint, family: Family, basis: torch.Tensor | None, device: str = "cpu") -> Checkpoint:
    """A model that computes the same as `base`, its stream in this basis. basis None: its shapes alone.

    Raises InfeasiblePlan.
    """
    check(family)
    q = None if basis is None else basis.to(device)
    tensors = dict(base.tensors)
    layers = int(base.config["num_hidden_layers"])

    def columns(lazy: LazyTensor, norm: str | None = None) -> LazyTensor:  # of what reads: W diag(g) Q
        def turned(weight: torch.Tensor) -> torch.Tensor:
            if q is None:
                return weight
            weight = weight.to(device).float()
            if norm is not None:
                weight = weight * base.tensors[f"{norm}.weight"].load().to(device).float()
            return (weight @ q).to(lazy.dtype).cpu()

        return lazy.map(turned)

    def rows(lazy: LazyTensor) -> LazyTensor:  # of what writes: Qᵀ W, and a bias the same
        def turned(weight: torch.Tensor) -> torch.Tensor:
            return weight if q is None else (q.T @ weight.to(device).float()).to(lazy.dtype).cpu()

        return lazy.map(turned)

    embedding, head = f"{family.embedding}.weight", f"{family.lm_head}.weight"
    tensors[head] = columns(base.tensors.get(head, base.tensors[embedding]), family.final_norm)
    tensors[embedding] = columns(base.tensors[embedding])
    for layer in range(layers):
        for part, norm in readers(family).items():
            name = f"{family.in_layer(layer, part)}.weight"
            tensors[name] = columns(base.tensors[name], family.in_layer(layer, norm))
        for part in (family.o, family.down):
            for name in (f"{family.in_layer(layer, part)}.weight", f"{family.in_layer(layer, part)}.bias"):
                if name in tensors:
                    tensors[name] = rows(base.tensors[name])
    for norm in family.residual_norms(layers):
        tensors[f"{norm}.weight"] = base.tensors[f"{norm}.weight"].map(torch.ones_like)
    return dataclasses.replace(base, config={**base.config, "tie_word_embeddings": False}, tensors=tensors)


def readers(family: Family) -> dict[str, str]:
    """Of each projection that reads from the stream, the norm before it."""
    attention, mlp = family.block_norms
    return {family.q: attention, family.k: attention, family.v: attention, family.gate: mlp, family.up: mlp}


def of_inputs(base: Checkpoint, family: Family, basis: torch.Tensor) -> Callable[[int, str], torch.Tensor | None]:
    """(layer of `base`, projection) → T [E, E], where the projection reads T x in the turned model and x in `base`;
    None where it reads the same. A dimension without a gain is zero in x, and nothing is known of it."""

    def change(layer: int, part: str) -> torch.Tensor | None:
        norm = readers(family).get(part)
        if norm is None:
            return None
        gain = base.tensors[f"{family.in_layer(layer, norm)}.weight"].load().float()
        return basis.T * torch.where(gain == 0, torch.zeros_like(gain), 1 / gain)

    return change
