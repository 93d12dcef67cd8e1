"""Collect the second moments of every projection's input, by domain of the calibration text, for OBS, repair and GPTQ.

They are collected once from the base model, layer by layer, and kept in one file per layer. Beside the model,
collecting takes the memory of the residual streams and of a few layers' moments, which wait in main memory where a GPU
has little left. Using them takes one layer's. Symbols: K input width of a Linear, B windows of T tokens.

A single token can hold nearly all of trace(H). The massive activations of a first token are a thousand times those of
the others: https://arxiv.org/abs/2402.17762. Such tokens are scaled down to CLIP times the median norm of their window,
so that they count without outweighing the rest.

Where a norm follows a projection (EXAONE 4, Gemma 3), it divides each token's output by its root mean square, so an
error counts relative to that output: such a token weighs 1 / (mean((W x)²) + ε), with the norm's own ε. That takes the
place of CLIP. Over the number of tokens, tr(W H Wᵀ) is then that of outputs in each domain, so domains count alike too.
Of an EXAONE 4 of 31M parameters with three quarters of its FFN, KL fell by 12 to 14%, the mean over its two languages.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from compressors import cached
from compressors.device import batch_of, compute_dtype, home, tensor_cores
from compressors.errors import CheckpointError, MachineError
from compressors.files import alone
from compressors.model import cached_tensors
from compressors.model.cached_tensors import Shapes
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family, family_of, head_dim
from compressors.statistics.layerwise import Called, Inputs, Layers
from compressors.statistics.predictions import spread
from compressors.statistics.symmetric import pack, packed_size, unpack

DESCRIBED = "moments.json"
WINDOWS = "windows.json"
LEAST_WINDOWS = 2  # of a domain, where tokens are limited: what is fitted on one is judged on the other
TOKENS, TOKENS_ON_GPU = 8_192, 32_768  # of each domain; of four times as many `stream` makes .006 of PerfNorm more
WEIGHTING = 1  # increase it when tokens are weighed otherwise where a norm follows
CLIP = 4.0  # times the median L2 norm of a window's tokens
WRITERS = 4  # threads that write layers while the next ones are computed

InputMoment = Callable[[str], torch.Tensor]  # a module's name → E[x xᵀ] [K, K] of its input


@dataclasses.dataclass(frozen=True)
class Moment:
    """Moment holds the moments of an input x [K] over tokens.

    Attributes:
        second: [K, K], the mean of x xᵀ over tokens, or of w x xᵀ where a norm follows the projection; float32.
        mean: [K], the mean of x; or Σ w x / √(n Σ w) over n tokens, so that second − mean meanᵀ is w's mean times the
            covariance.
        tokens: The number of tokens.
        weight: How much they count in a mean with those of other texts.
    """

    second: torch.Tensor
    mean: torch.Tensor
    tokens: int
    weight: float = 1.0

    def to(self, device: str) -> Moment:
        """Return the moments on `device`."""
        return dataclasses.replace(self, second=self.second.to(device), mean=self.mean.to(device))

    def through(self, change: torch.Tensor) -> Moment:
        """Return the moments of T x, where `change` is T [K, K]."""
        return dataclasses.replace(self, second=change @ self.second @ change.T, mean=change @ self.mean)

    def take(self, index: torch.Tensor) -> Moment:
        """Return the moments of the inputs `index` alone."""
        return dataclasses.replace(self, second=self.second[index][:, index], mean=self.mean[index])


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments gives access to a directory with the moments of each layer in a file.

    Attributes:
        path: The directory.
        domains: The names of the calibration texts, in order.
        layers: The number in the base model of each layer.
        change: (layer of the base model, projection) → T [K, K] where a rotated model reads T x; None where it reads x.
        again: A function that collects a layer of the base model again, whose file is damaged; None: that is an error.
        weights: How much each domain counts; None: all the same.
        strength: Strength of `compressors.methods.repair`, in place of the one that is chosen for each projection,
            which takes several times as long as the repair; None: it is chosen.
        tokens: About how many tokens `stream` is fitted on, for a look at what it gains; None: all. The result is kept
            in memory alone.
        more: Returns the windows of token ids that a distillation learns from, by domain; None: those of the moments.
    """

    path: Path
    domains: tuple[str, ...]
    layers: tuple[int, ...]
    change: Callable[[int, str], torch.Tensor | None] = lambda layer, part: None
    again: Callable[[int], None] | None = dataclasses.field(default=None, compare=False)
    weights: tuple[float, ...] | None = None
    strength: float | None = None
    tokens: int | None = None
    more: Callable[[], Mapping[str, Sequence[Sequence[int]]]] | None = dataclasses.field(default=None, compare=False)

    def of(self, layer: int, part: str, device: str = "cpu") -> dict[str, Moment]:
        """Return the moments of the input of the projection `part` in a layer, by domain.

        q, k and v share one input, gate and up another; `input_of` names the projection that stands for them.

        Raises:
            CheckpointError: When the file is damaged or missing, and can't be collected again.
        """
        index = self.layers[layer]
        file = self.path / _file_of(index)
        try:
            try:
                moments = self._read(file, part, device)
            except cached.DAMAGE:
                if self.again is None:
                    raise
                self.again(index)
                moments = self._read(file, part, device)
        except cached.DAMAGE as error:
            if isinstance(error, CheckpointError):
                raise
            raise _unreadable(file, error) from None
        change = self.change(self.layers[layer], part)
        if change is None:
            return moments
        change = change.to(device)
        return {domain: moment.through(change) for domain, moment in moments.items()}

    def mixed(self, layer: int, part: str, device: str = "cpu") -> Moment:
        """Return the mean of the moments over domains, see `mixed` and `of`.

        On a GPU those of the base model stay in its memory for the next plan, where they take a small part of it.
        """
        file = self.path / _file_of(self.layers[layer])
        if self.change(self.layers[layer], part) is not None or not device.startswith("cuda"):
            return mixed(self.of(layer, part, device))
        key = (str(file), file.stat().st_mtime_ns if file.exists() else 0, part, device, self.domains, self.weights)
        if key in _on_gpu:
            return _on_gpu[key]
        moment = mixed(self.of(layer, part, device))
        held = sum(each.second.nbytes for each in _on_gpu.values())
        if home(device, held + moment.second.nbytes) == device:
            _on_gpu[key] = moment
        return moment

    def _read(self, file: Path, part: str, device: str) -> dict[str, Moment]:
        tokens = json.loads(cached_tensors.metadata(file)["tokens"])
        weights = self.shares()

        def of_domain(domain: str) -> Moment:
            packed = cached_tensors.read(file, f"{domain}.{part}.second").to(device)
            mean = cached_tensors.read(file, f"{domain}.{part}.mean").to(device)
            return Moment(unpack(packed, len(mean)), mean, int(tokens[domain]), weights[domain])

        with ThreadPoolExecutor(len(self.domains)) as readers:  # a first reading compares digests
            return dict(zip(self.domains, readers.map(of_domain, self.domains), strict=True))

    def windows(self) -> dict[str, list[list[int]]]:
        """Return the token ids that the moments were collected on, by domain.

        Raises:
            CheckpointError: When the file is damaged or missing.
        """
        try:
            stored = cached.read_json(self.path / WINDOWS)
            return {domain: stored[domain] for domain in self.domains}
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(self.path / WINDOWS, error) from None

    def few_windows(self) -> Mapping[str, Sequence[Sequence[int]]]:
        """Return windows spread over each domain, of about `tokens` tokens in all. Raises what `windows` raises."""
        every = self.windows()
        if self.tokens is None:
            return every
        longest = max(len(window) for windows in every.values() for window in windows)
        count = max(LEAST_WINDOWS, self.tokens // (longest * len(every)))
        return {domain: spread(windows, count) for domain, windows in every.items()}

    def lessons(self) -> Mapping[str, Sequence[Sequence[int]]]:
        """Return the windows of token ids that a distillation learns from, by domain. Raises what `windows` raises."""
        return self.windows() if self.more is None else self.more()

    def shares(self) -> dict[str, float]:
        """Return how much each domain counts; they sum to the number of domains."""
        weights = self.weights or (1.0,) * len(self.domains)
        scale = len(weights) / sum(weights)
        return {domain: weight * scale for domain, weight in zip(self.domains, weights, strict=True)}

    def of_layers(self, kept: Sequence[int]) -> Moments:
        """Return the moments of the kept layers, renumbered as in the cut model."""
        return dataclasses.replace(self, layers=tuple(self.layers[old] for old in kept))


_on_gpu: dict[tuple[Any, ...], Moment] = {}  # means over domains, by file, time, projection, device and domains


def mixed(moments: Mapping[str, Moment], without: str | None = None) -> Moment:
    """Return the mean over domains by their weights; `without` names one to leave out."""
    counted = [moment for name, moment in moments.items() if name != without]
    weights = [moment.weight for moment in counted]
    return Moment(
        weighted([moment.second for moment in counted], weights),
        weighted([moment.mean for moment in counted], weights),
        sum(moment.tokens for moment in counted),
    )


def weighted(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the mean of tensors of one shape by their weights."""
    if len(set(weights)) == 1:
        return torch.stack(list(tensors)).mean(0)
    whole = sum(weights)
    return sum(
        (tensor * (weight / whole) for tensor, weight in zip(tensors, weights, strict=True)), start=torch.zeros(())
    )


def collect(
    base: Checkpoint,
    domains: Mapping[str, Sequence[Sequence[int]]],
    path: Path,
    device: str = "cpu",
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Moments:
    """Run `base` over the windows of each domain, and write the moments to `path`, whole or not at all.

    If another process is collecting the same, its result is waited for. Files that are missing, damaged or of other
    windows are collected again, and no others.

    Args:
        base: The model.
        domains: The windows of token ids by domain.
        path: The directory to write; what is there is checked and used.
        device: The device that runs the model.
        batch: The number of windows that run at once; None: as many as the device takes well.
        progress: A function that is called with (layers done, layers in all) after each layer.
        weights: How much each domain counts in the mean over them; None: all the same.

    Raises:
        CheckpointError: When activations are not finite.
        MachineError: When the directory can't be written.
    """
    windows = {name: list(map(list, some)) for name, some in domains.items()}
    longest = max((len(window) for some in windows.values() for window in some), default=1)
    work = _Work(base, windows, path, device, batch or batch_of(device, longest), progress)
    if work.damage():
        with alone(path):
            for leftover in path.parent.glob(f".{path.name}.*/"):  # of processes that were killed
                if ".damaged-" not in leftover.name:
                    shutil.rmtree(leftover, ignore_errors=True)
            if path.exists() and not path.is_dir():
                cached.drop(path, ValueError("it is no directory"))
            elif path.is_dir() and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                cached.drop(path, ValueError("its permissions don't allow to use it"))
            work.collect(work.damage())
    counted = None if weights is None else tuple(weights[name] for name in domains)
    return Moments(path, tuple(domains), tuple(range(work.layers)), again=work.again, weights=counted)


def windows_on(device: str, length: int) -> int:
    """Return how many windows of `length` tokens of each domain moments are collected on, where none are named."""
    return max(LEAST_WINDOWS, (TOKENS_ON_GPU if device.startswith("cuda") else TOKENS) // length)


def weighting(family: Family) -> tuple[str, ...]:
    """Return what a key has to hold beside the text: how tokens are weighed, where that is not by their number."""
    return (f"weighed as their norms divide {WEIGHTING}",) if family.output_norms else ()


def file_bytes(base: Checkpoint, domains: int) -> int:
    """Return about how many bytes `collect` writes for a number of domains."""
    config = base.config
    stream, wide = int(config["hidden_size"]), int(config["intermediate_size"])
    attention = head_dim(config) * int(config["num_attention_heads"])
    of_layer = sum(packed_size(width) for width in (stream, attention, stream, wide))
    return 4 * int(config["num_hidden_layers"]) * domains * of_layer


@dataclasses.dataclass(frozen=True)
class _Work:
    """_Work collects the files of a directory of moments, all of them or those that are damaged."""

    base: Checkpoint
    domains: Mapping[str, Sequence[Sequence[int]]]
    path: Path
    device: str
    batch: int
    progress: Callable[[int, int], None] | None

    @property
    def layers(self) -> int:
        return int(self.base.config["num_hidden_layers"])

    def damage(self) -> dict[str, Exception]:
        """Return what is wrong with each file that is missing or damaged; tensors are not read."""
        wrong: dict[str, Exception] = {}
        for name, expected in self._described().items():
            try:
                if cached.read_json(self.path / name) != expected:
                    raise ValueError("it is of other text")
            except cached.DAMAGE as error:
                wrong[name] = error
        for layer in range(self.layers):
            try:
                self._require_layer(layer)
            except cached.DAMAGE as error:
                wrong[_file_of(layer)] = error
        return wrong

    def again(self, layer: int) -> None:
        """Collect a layer again, unless another process has done so."""
        with alone(self.path):
            try:
                self._require_layer(layer)
                for name in self._shapes(layer):
                    cached_tensors.read(self.path / _file_of(layer), name)
            except cached.DAMAGE as error:
                self.collect({_file_of(layer): error})

    def collect(self, wrong: Mapping[str, Exception]) -> None:
        """Collect these files, and put them in their place when all are written; the caller holds the lock."""
        if not wrong:
            return
        fresh = not self.path.is_dir()
        try:
            with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f".{self.path.name}.") as scratch:
                written = Path(scratch, self.path.name)
                written.mkdir()
                for name, values in self._described().items():
                    (written / name).write_text(json.dumps(values))
                self._run([layer for layer in range(self.layers) if _file_of(layer) in wrong], written)
                if fresh:
                    written.replace(self.path)
                    return
                for name, error in wrong.items():
                    if isinstance(error, FileNotFoundError):
                        cached.tell(self.path / name, cached.reason_of(error))
                    else:
                        cached.drop(self.path / name, error)
                    (written / name).replace(self.path / name)
        except OSError as error:
            raise MachineError(
                f"moments {self.path}: can't be written ({cached.reason_of(error)}); free some space"
            ) from None

    def _described(self) -> dict[str, Any]:
        return {DESCRIBED: {"domains": list(self.domains), "layers": self.layers}, WINDOWS: dict(self.domains)}

    def _shapes(self, layer: int) -> Shapes:
        family = family_of(self.base)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for part in inputs(family):
            width = self.base.tensors[f"{family.in_layer(layer, part)}.weight"].shape[1]
            for name in self.domains:
                shapes[f"{name}.{part}.second"] = (packed_size(width),), torch.float32
                shapes[f"{name}.{part}.mean"] = (width,), torch.float32
        return shapes

    def _require_layer(self, layer: int) -> None:
        tokens = json.loads(cached_tensors.require(self.path / _file_of(layer), self._shapes(layer))["tokens"])
        for name, windows in self.domains.items():
            if tokens[name] != sum(map(len, windows)):
                raise ValueError(f"it counts {tokens[name]} tokens of {name}")

    def _run(self, wanted: Sequence[int], written: Path) -> None:
        """Run the model up to the last wanted layer, and write the wanted ones."""
        if not wanted:
            return
        family = family_of(self.base)
        model = self.base.to_model(self.device, dtype=compute_dtype(self.device))
        called: Called = {}
        norm_eps = float(model.config.rms_norm_eps)
        streams = {name: Layers(model, family, some, self.batch, called) for name, some in self.domains.items()}
        waiting: list[Future[None]] = []
        of_layer = file_bytes(self.base, len(self.domains)) // self.layers
        with ThreadPoolExecutor(WRITERS) as writers:
            for index in range(max(wanted) + 1):
                tensors: dict[str, torch.Tensor] = {}
                tokens, kept_at = {}, home(self.device, (WRITERS + 2) * of_layer)
                for name, stream in streams.items():
                    sums = {part: _Sum() for part in inputs(family)}
                    norms = {norm: sums[part].weigh(norm_eps) for part, norm in family.output_norms.items()}
                    stream.forward(index, norms | {part: of_part.add for part, of_part in sums.items()})
                    for part, of_part in sums.items():
                        tensors[f"{name}.{part}.second"] = pack(of_part.second / of_part.tokens).to(kept_at)
                        tensors[f"{name}.{part}.mean"] = of_part.mean / (of_part.tokens * of_part.weight) ** 0.5
                        tokens[name] = of_part.tokens
                if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
                    raise CheckpointError(
                        f"calibration: activations of layer {index} are NaN or infinite; the weights are broken, copy "
                        "them again"
                    )
                if index in wanted:
                    counted = {"tokens": json.dumps(tokens)}
                    file, named = written / _file_of(index), f"moments {self.path}:"
                    waiting.append(writers.submit(cached_tensors.keep, file, tensors, named, counted))
                    while len(waiting) > WRITERS:
                        waiting.pop(0).result()
                if self.progress is not None:
                    self.progress(index + 1, max(wanted) + 1)
            for each in waiting:
                each.result()


def opened(path: Path) -> Moments:
    """Open what `collect` wrote.

    Raises:
        CheckpointError: When it is damaged.
    """
    try:
        described = cached.read_json(path / DESCRIBED)
        return Moments(path, tuple(described["domains"]), tuple(range(described["layers"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from None


def _file_of(layer: int) -> str:
    return f"layer-{layer}.safetensors"


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"moments {path}: can't be read ({cached.reason_of(error)}); delete it, and it is collected again"
    )


def inputs(family: Family) -> tuple[str, ...]:
    """Return one projection for each distinct input of a layer: q (for k and v too), o, gate (for up too), down."""
    return (family.q, family.o, family.gate, family.down)


def input_of(family: Family, part: str) -> str:
    """Return the projection that stands for `part` in the files."""
    return {family.k: family.q, family.v: family.q, family.up: family.gate}.get(part, part)


class _Sum:
    """_Sum adds up Σ w x xᵀ, Σ w x and Σ w of tokens, in float32 on the model's device.

    Tokens are clipped and weigh 1, but for those whose weights `weigh` has been told.
    """

    def __init__(self) -> None:
        self.second: Any = 0.0
        self.mean: Any = 0.0
        self.weight: Any = 0.0
        self.tokens = 0
        self._next: torch.Tensor | None = None

    def weigh(self, norm_eps: float) -> Inputs:
        """Return a function that takes W x [B, T, N] of the tokens that `add` gets next, and weighs them by it."""

        def put_out(outputs: torch.Tensor) -> None:
            square = outputs.float().square().mean(-1, keepdim=True)  # (B, T, 1)
            self._next = 1 / (square + norm_eps).clamp_min(1e-30)

        return put_out

    def add(self, x: torch.Tensor) -> None:
        """Add the tokens x [B, T, K]."""
        if self._next is None:
            x = clipped(x.float()).flatten(0, -2)  # (B·T, K)
            total = x.sum(0)
            self.weight += len(x)
        else:
            root = self._next.sqrt().flatten(0, -2)  # on both sides, so that rounding leaves no negative eigenvalue
            x = root * x.float().flatten(0, -2)
            total = (root * x).sum(0)
            self.weight = self.weight + self._next.sum()
            self._next = None
        with tensor_cores(x.device):
            self.second = self.second + x.T @ x
        self.mean = self.mean + total
        self.tokens += len(x)


def clipped(x: torch.Tensor) -> torch.Tensor:
    """Return x [B, T, K] with every token scaled to at most CLIP times the median norm of its window."""
    norm = x.norm(dim=-1, keepdim=True)  # (B, T, 1)
    limit = CLIP * norm.median(dim=-2, keepdim=True).values
    shortened: torch.Tensor = x * (limit / norm.clamp_min(1e-30)).clamp_max(1.0)
    return shortened
