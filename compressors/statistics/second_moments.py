"""Second moments of the inputs of every projection, by domain of the calibration text: for OBS, repair and GPTQ.

Collected once from the base model, layer by layer, and kept in a file a layer, so that neither collecting nor using
them takes more memory than a layer's. Symbols: K input width of a Linear, B windows of T tokens.

A token position can hold nearly all of trace(H): the massive activations of a first token are a thousand times those
of the others (https://arxiv.org/abs/2402.17762). Such tokens are scaled down to CLIP times the median norm of their
window: they count, and crush nothing.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compressors.device import compute_dtype
from compressors.errors import CheckpointError
from compressors.files import alone
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family, family_of, head_dim
from compressors.statistics.layerwise import Called, Layers

WINDOWS = "windows.json"
CLIP = 4.0  # × the median L2 norm of a window's tokens


@dataclasses.dataclass(frozen=True)
class Moment:
    """second [K, K]: mean of x xᵀ, float32; mean [K]: of x. tokens: how many they are over."""

    second: torch.Tensor
    mean: torch.Tensor
    tokens: int

    def to(self, device: str) -> Moment:
        return Moment(self.second.to(device), self.mean.to(device), self.tokens)

    def through(self, change: torch.Tensor) -> Moment:
        """Of T x, T [K, K]."""
        return Moment(change @ self.second @ change.T, change @ self.mean, self.tokens)

    def take(self, index: torch.Tensor) -> Moment:
        """Of these inputs alone."""
        return Moment(self.second[index][:, index], self.mean[index], self.tokens)


@dataclasses.dataclass(frozen=True)
class Moments:
    """A directory with a file a layer. domains: the names of the calibration's texts, in order.

    change: (layer of the base model, projection) → T [K, K], where a turned model reads T x; None where it reads x.
    """

    path: Path
    domains: tuple[str, ...]
    layers: tuple[int, ...]  # of the base model, in the order of the model that they are of
    change: Callable[[int, str], torch.Tensor | None] = lambda layer, part: None

    def of(self, layer: int, part: str, device: str = "cpu") -> dict[str, Moment]:
        """By domain, of the input of the projection `part` in a layer. q, k and v have one input, gate and up another.

        Raises CheckpointError for a file that is not whole.
        """
        file = self.path / f"layer-{self.layers[layer]}.safetensors"
        try:
            with safe_open(file, framework="pt") as stored:
                tokens = json.loads((stored.metadata() or {})["tokens"])
                found = {
                    domain: Moment(
                        stored.get_tensor(f"{domain}.{part}.second"),
                        stored.get_tensor(f"{domain}.{part}.mean"),
                        tokens[domain],
                    ).to(device)
                    for domain in self.domains
                }
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"moments {file}: can't be read ({error}); delete {self.path}, it is made again"
            ) from None
        change = self.change(self.layers[layer], part)
        if change is None:
            return found
        change = change.to(device)
        return {domain: moment.through(change) for domain, moment in found.items()}

    def windows(self) -> dict[str, list[list[int]]]:
        """By domain, the token ids that they were collected on. Raises CheckpointError."""
        try:
            stored = json.loads((self.path / WINDOWS).read_text())
            return {domain: stored[domain] for domain in self.domains}
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"moments {self.path / WINDOWS}: can't be read ({error}); delete {self.path}, it is made again"
            ) from None

    def of_layers(self, kept: Sequence[int]) -> Moments:
        """Those of the layers that stay, renumbered as they are in the cut model."""
        return dataclasses.replace(self, layers=tuple(self.layers[old] for old in kept))


def mixed(moments: Mapping[str, Moment], without: str | None = None) -> Moment:
    """The mean over domains, each counting the same, but one that is left out."""
    those = [moment for name, moment in moments.items() if name != without]
    return Moment(
        torch.stack([moment.second for moment in those]).mean(0),
        torch.stack([moment.mean for moment in those]).mean(0),
        sum(moment.tokens for moment in those),
    )


def collect(
    base: Checkpoint,
    domains: Mapping[str, Sequence[Sequence[int]]],
    path: Path,
    device: str = "cpu",
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """Run `base` over the windows of each domain and write `path`, beside its place and then renamed.

    Another process that does the same is waited for. Raises CheckpointError when activations are not finite, or it
    can't be written.
    """
    if path.is_dir():
        return opened(path)
    with alone(path):
        for left in path.parent.glob(f".{path.name}.*/"):  # of calls that were killed
            shutil.rmtree(left, ignore_errors=True)
        if not path.is_dir():
            _collect(base, domains, path, device, batch, progress)
    return opened(path)


def file_bytes(base: Checkpoint, domains: int) -> int:
    """About what `collect` writes."""
    config = base.config
    stream, wide = int(config["hidden_size"]), int(config["intermediate_size"])
    attention = head_dim(config) * int(config["num_attention_heads"])
    return 4 * int(config["num_hidden_layers"]) * domains * (2 * stream**2 + attention**2 + wide**2)


def _collect(
    base: Checkpoint,
    domains: Mapping[str, Sequence[Sequence[int]]],
    path: Path,
    device: str,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    family = family_of(base)
    count = int(base.config["num_hidden_layers"])
    model = base.to_model(device, dtype=compute_dtype(device))
    called: Called = {}
    streams = {name: Layers(model, family, windows, batch, called) for name, windows in domains.items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        made = Path(scratch, path.name)
        made.mkdir()
        for index in range(count):
            tensors: dict[str, torch.Tensor] = {}
            tokens = {}
            for name, stream in streams.items():
                sums = {part: _Sum() for part in inputs(family)}
                stream.forward(index, {part: of_part.add for part, of_part in sums.items()})
                for part, of_part in sums.items():
                    tensors[f"{name}.{part}.second"] = (of_part.second / of_part.tokens).cpu()
                    tensors[f"{name}.{part}.mean"] = (of_part.mean / of_part.tokens).cpu()
                    tokens[name] = of_part.tokens
            if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
                raise CheckpointError(f"calibration: activations of layer {index} are NaN or infinite: broken weights")
            try:
                save_file(tensors, made / f"layer-{index}.safetensors", {"tokens": json.dumps(tokens)})
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"moments {path}: can't be written ({error}); free some space") from None
            if progress is not None:
                progress(index + 1, count)
        described = {"domains": list(domains), "layers": count}
        (made / "moments.json").write_text(json.dumps(described))
        (made / WINDOWS).write_text(json.dumps({name: list(map(list, those)) for name, those in domains.items()}))
        made.replace(path)


def opened(path: Path) -> Moments:
    """What `collect` wrote. Raises CheckpointError."""
    try:
        described = json.loads((path / "moments.json").read_text())
        return Moments(path, tuple(described["domains"]), tuple(range(described["layers"])))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"moments {path}: can't be read ({error}); delete it, it is made again") from None


def inputs(family: Family) -> tuple[str, ...]:
    """One projection for each input that is told apart: those of q (k, v), o, gate (up) and down."""
    return (family.q, family.o, family.gate, family.down)


def input_of(family: Family, part: str) -> str:
    """The projection that stands for `part` in the files."""
    return {family.k: family.q, family.v: family.q, family.up: family.gate}.get(part, part)


class _Sum:
    """Of clipped tokens: Σ x xᵀ and Σ x in float32 on the model's device."""

    def __init__(self) -> None:
        self.second: Any = 0.0
        self.mean: Any = 0.0
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        x = clipped(x.float()).flatten(0, -2)  # (B·T, K)
        self.second = self.second + x.T @ x
        self.mean = self.mean + x.sum(0)
        self.tokens += len(x)


def clipped(x: torch.Tensor) -> torch.Tensor:
    """x [B, T, K] with no token longer than CLIP times the median of its window."""
    norm = x.norm(dim=-1, keepdim=True)  # (B, T, 1)
    limit = CLIP * norm.median(dim=-2, keepdim=True).values
    made: torch.Tensor = x * (limit / norm.clamp_min(1e-30)).clamp_max(1.0)
    return made
