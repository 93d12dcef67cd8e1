"""Collect the second moments of every projection's input, by domain of the calibration text, for OBS, repair and GPTQ.

They are collected once from the base model, layer by layer, and kept in one file per layer. Neither collecting nor
using them takes more memory than one layer. Symbols: K input width of a Linear, B windows of T tokens.

A single token can hold nearly all of trace(H). The massive activations of a first token are a thousand times those of
the others: https://arxiv.org/abs/2402.17762. Such tokens are scaled down to CLIP times the median norm of their window,
so that they count without outweighing the rest.
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
CLIP = 4.0  # times the median L2 norm of a window's tokens

InputMoment = Callable[[str], torch.Tensor]  # a module's name → E[x xᵀ] [K, K] of its input


@dataclasses.dataclass(frozen=True)
class Moment:
    """Moment holds the moments of an input x [K] over tokens.

    Attributes:
        second: [K, K], the mean of x xᵀ, float32.
        mean: [K], the mean of x.
        tokens: The number of tokens.
    """

    second: torch.Tensor
    mean: torch.Tensor
    tokens: int

    def to(self, device: str) -> Moment:
        """Return the moments on `device`."""
        return Moment(self.second.to(device), self.mean.to(device), self.tokens)

    def through(self, change: torch.Tensor) -> Moment:
        """Return the moments of T x, where `change` is T [K, K]."""
        return Moment(change @ self.second @ change.T, change @ self.mean, self.tokens)

    def take(self, index: torch.Tensor) -> Moment:
        """Return the moments of the inputs `index` alone."""
        return Moment(self.second[index][:, index], self.mean[index], self.tokens)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments gives access to a directory with the moments of each layer in a file.

    Attributes:
        path: The directory.
        domains: The names of the calibration texts, in order.
        layers: The number in the base model of each layer.
        change: (layer of the base model, projection) → T [K, K] where a rotated model reads T x; None where it reads x.
    """

    path: Path
    domains: tuple[str, ...]
    layers: tuple[int, ...]
    change: Callable[[int, str], torch.Tensor | None] = lambda layer, part: None

    def of(self, layer: int, part: str, device: str = "cpu") -> dict[str, Moment]:
        """Return the moments of the input of the projection `part` in a layer, by domain.

        q, k and v share one input, gate and up another; `input_of` names the projection that stands for them.

        Raises:
            CheckpointError: When the file is damaged or missing.
        """
        file = self.path / f"layer-{self.layers[layer]}.safetensors"
        try:
            with safe_open(file, framework="pt") as stored:
                tokens = json.loads((stored.metadata() or {})["tokens"])
                moments = {
                    domain: Moment(
                        stored.get_tensor(f"{domain}.{part}.second"),
                        stored.get_tensor(f"{domain}.{part}.mean"),
                        tokens[domain],
                    ).to(device)
                    for domain in self.domains
                }
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"moments {file}: can't be read ({error}); delete {self.path}, and they are collected again"
            ) from None
        change = self.change(self.layers[layer], part)
        if change is None:
            return moments
        change = change.to(device)
        return {domain: moment.through(change) for domain, moment in moments.items()}

    def windows(self) -> dict[str, list[list[int]]]:
        """Return the token ids that the moments were collected on, by domain.

        Raises:
            CheckpointError: When the file is damaged or missing.
        """
        try:
            stored = json.loads((self.path / WINDOWS).read_text())
            return {domain: stored[domain] for domain in self.domains}
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"moments {self.path / WINDOWS}: can't be read ({error}); delete {self.path}, and they are collected "
                "again"
            ) from None

    def of_layers(self, kept: Sequence[int]) -> Moments:
        """Return the moments of the kept layers, renumbered as in the cut model."""
        return dataclasses.replace(self, layers=tuple(self.layers[old] for old in kept))


def mixed(moments: Mapping[str, Moment], without: str | None = None) -> Moment:
    """Return the mean over domains, all with the same weight; `without` names one to leave out."""
    counted = [moment for name, moment in moments.items() if name != without]
    return Moment(
        torch.stack([moment.second for moment in counted]).mean(0),
        torch.stack([moment.mean for moment in counted]).mean(0),
        sum(moment.tokens for moment in counted),
    )


def collect(
    base: Checkpoint,
    domains: Mapping[str, Sequence[Sequence[int]]],
    path: Path,
    device: str = "cpu",
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """Run `base` over the windows of each domain, and write the moments to `path`, whole or not at all.

    If another process is collecting the same, its result is waited for.

    Args:
        base: The model.
        domains: The windows of token ids by domain.
        path: The directory to write; if it exists, it is opened.
        device: The device that runs the model.
        batch: The number of windows that run at once.
        progress: A function that is called with (layers done, layers in all) after each layer.

    Raises:
        CheckpointError: When activations are not finite, or the directory can't be written.
    """
    if path.is_dir():
        return opened(path)
    with alone(path):
        for leftover in path.parent.glob(f".{path.name}.*/"):  # of processes that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        if not path.is_dir():
            _collect(base, domains, path, device, batch, progress)
    return opened(path)


def file_bytes(base: Checkpoint, domains: int) -> int:
    """Return about how many bytes `collect` writes for a number of domains."""
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
        written = Path(scratch, path.name)
        written.mkdir()
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
                raise CheckpointError(
                    f"calibration: activations of layer {index} are NaN or infinite; the weights are broken, copy them "
                    "again"
                )
            try:
                save_file(tensors, written / f"layer-{index}.safetensors", {"tokens": json.dumps(tokens)})
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"moments {path}: can't be written ({error}); free some space") from None
            if progress is not None:
                progress(index + 1, count)
        described = {"domains": list(domains), "layers": count}
        (written / "moments.json").write_text(json.dumps(described))
        (written / WINDOWS).write_text(json.dumps({name: list(map(list, some)) for name, some in domains.items()}))
        written.replace(path)


def opened(path: Path) -> Moments:
    """Open what `collect` wrote.

    Raises:
        CheckpointError: When it is damaged.
    """
    try:
        described = json.loads((path / "moments.json").read_text())
        return Moments(path, tuple(described["domains"]), tuple(range(described["layers"])))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"moments {path}: can't be read ({error}); delete it, and they are collected again"
        ) from None


def inputs(family: Family) -> tuple[str, ...]:
    """Return one projection for each distinct input of a layer: q (for k and v too), o, gate (for up too), down."""
    return (family.q, family.o, family.gate, family.down)


def input_of(family: Family, part: str) -> str:
    """Return the projection that stands for `part` in the files."""
    return {family.k: family.q, family.v: family.q, family.up: family.gate}.get(part, part)


class _Sum:
    """_Sum adds up Σ x xᵀ and Σ x of clipped tokens, in float32 on the model's device."""

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
    """Return x [B, T, K] with every token scaled to at most CLIP times the median norm of its window."""
    norm = x.norm(dim=-1, keepdim=True)  # (B, T, 1)
    limit = CLIP * norm.median(dim=-2, keepdim=True).values
    shortened: torch.Tensor = x * (limit / norm.clamp_min(1e-30)).clamp_max(1.0)
    return shortened
