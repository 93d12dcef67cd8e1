"""Find the safetensors files of a checkpoint's directory, as transformers does: a stray file beside them is no part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from readers import json_reader
from readers.errors import ReadError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def _index_of(path: Path) -> Any:
    return json_reader.read(path, mark=False, finite=False)


def find(path: Path, read: Callable[[Path], Any] = _index_of) -> list[Path]:
    """Return model.safetensors, or the shards directly in the directory that the index names, sorted by name.

    Args:
        path: The directory.
        read: A function that returns the values of the index.

    Raises:
        ReadError: When there are none, a shard is missing or outside of the directory, or only pickled weights are
            there.
        OSError: When the index can't be read.
    """
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        values = read(path / INDEX)
        named = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise ReadError(f"{INDEX} has no weight_map of names to files; copy it again")
        foreign_names = sorted(name for name in named.values() if Path(name) != Path(Path(name).name))
        if foreign_names:
            raise ReadError(
                f"{INDEX} names {ascii(foreign_names[0])[1:-1][:100]}, which is not directly in the model's directory; "
                "put the shards there, and correct the index"
            )
        files = sorted({path / Path(name).name for name in named.values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing or not files:
            raise ReadError(f"shards named in {INDEX} are missing: {', '.join(missing) or 'all'}; copy them there")
        return files
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
    if pickles:
        raise ReadError(
            f"has only pickled weights ({pickles[0]}), which can run code when they are read; convert them to "
            "safetensors"
        )
    raise ReadError(f"has no weights; put {WEIGHTS} there, or its shards with {INDEX}")
