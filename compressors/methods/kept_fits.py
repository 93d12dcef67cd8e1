"""Put weights that are fitted together into a checkpoint: fitted when one is first read, and kept."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from compressors import cached
from compressors.model import cached_tensors
from compressors.model.checkpoint import Checkpoint, LazyTensor

FILES = 4  # the number of results that are kept of each kind: each can be as large as the model


def fitted(
    cut: Checkpoint,
    names: Sequence[str],
    directory: Path,
    kind: str,
    key: Callable[[], str],
    fit: Callable[[], dict[str, torch.Tensor]],
    say: Callable[[str], None],
) -> Checkpoint:
    """Return `cut` with the weights `names` replaced by those that `fit` returns.

    Args:
        cut: The cut checkpoint, whose shapes and dtypes they have.
        names: The names of the weights.
        directory: The directory of the files; the last FILES of a kind are kept.
        kind: The kind of fit, as files and messages name it.
        key: Names the fit; asked when a weight is first read.
        fit: Returns the weights by name, on the CPU.
        say: Told what is waited for.

    Raises:
        MachineError: On reading a weight, when the file can't be written.
    """
    shapes = {name: (cut.tensors[name].shape, cut.tensors[name].dtype) for name in names}
    key = functools.cache(key)

    def load(name: str) -> torch.Tensor:
        def read(path: Path) -> torch.Tensor:
            cached_tensors.require(path, shapes)
            return cached_tensors.read(path, name)

        # one process at a time, since each needs the memory of two models
        return cached.kept(
            directory / f"{kind}-{key()}.safetensors",
            read,
            lambda path: _keep(path, fit(), kind),
            lambda: say("repair: waiting for another process that fits"),
            lock=directory / kind,
        )

    return _with(cut, names, load)


def fitted_in_memory(cut: Checkpoint, names: Sequence[str], fit: Callable[[], dict[str, torch.Tensor]]) -> Checkpoint:
    """Return `cut` with the weights `names` replaced by those that `fit` returns, for as long as the result lives."""
    once = functools.cache(fit)
    return _with(cut, names, lambda name: once()[name])


def _with(cut: Checkpoint, names: Sequence[str], load: Callable[[str], torch.Tensor]) -> Checkpoint:
    def lazily(name: str) -> LazyTensor:
        return LazyTensor(cut.tensors[name].shape, cut.tensors[name].dtype, functools.partial(load, name))

    return dataclasses.replace(cut, tensors={**cut.tensors, **{name: lazily(name) for name in names}})


def _keep(path: Path, weights: dict[str, torch.Tensor], kind: str) -> None:
    """Write the file; remove the oldest ones, and what killed processes left."""
    for leftover in path.parent.glob(f".{kind}-*"):
        with contextlib.suppress(OSError):
            leftover.unlink()
    kept = sorted(path.parent.glob(f"{kind}-*.safetensors"), key=lambda file: file.stat().st_mtime)
    for old in kept[: max(0, len(kept) - FILES + 1)]:
        with contextlib.suppress(OSError):
            old.unlink()
    cached_tensors.keep(path, weights, f"repair: {path}")
