"""Find the file of each weight of a model that is stored in several files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from compressors.errors import CheckpointError
from compressors.model import safetensors_file

SHARDS = "model-*-of-*.safetensors"

Stored = tuple[Path, tuple[int, ...], torch.dtype]


def stored_weights(files: Iterable[Path]) -> dict[str, Stored]:
    """Return the file, shape and dtype of each weight by name; only headers are read, unless a name is stored twice.

    Shards that lie next to a model.safetensors are compared with it: engines differ in which ones they read.

    Args:
        files: The safetensors files that loaders read.

    Raises:
        CheckpointError: For a damaged file, and for a weight that two files store with different values.
    """
    files = list(files)
    weights: dict[str, Stored] = {}
    for file in files:
        _add(weights, file)
    read = dict(weights)
    for directory in {file.parent for file in files if file.name == "model.safetensors"}:
        for file in sorted(directory.glob(SHARDS)):
            _add(weights, file)
            added = sorted(weights.keys() - read)
            if added:
                raise CheckpointError(
                    f"weights {directory}: {file.name} next to {files[0].name} holds {added[0]}, which that file "
                    "lacks, and engines differ in which ones they read; keep the files of one of them"
                )
    return read


def _add(weights: dict[str, Stored], file: Path) -> None:
    for name, (shape, dtype) in safetensors_file.shapes(file).items():
        if name in weights:
            _require_equal(name, weights[name], (file, shape, dtype))
        else:
            weights[name] = (file, shape, dtype)


def _require_equal(name: str, one: Stored, other: Stored) -> None:
    """Refuse two tensors of one name that differ: which one is read depends on the engine."""
    same = one[1:] == other[1:]
    if same:
        values = [safetensors_file.loader(file, name)().contiguous().view(-1) for file, *_ in (one, other)]
        same = torch.equal(*(value.view(torch.uint8) for value in values))
    if not same:
        raise CheckpointError(
            f"weights {one[0].parent}: {name} is in {one[0].name} and in {other[0].name} with different values, and "
            "engines differ in which one they read; save the model again"
        )
