"""Keep computed tensors in safetensors files with digests, and check them when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compressors.cached import DIGEST, reason_of, require_regular
from compressors.device import on_host
from compressors.errors import MachineError
from compressors.files import written_whole
from compressors.model.safetensors_file import NAMES

Shapes = Mapping[str, tuple[Sequence[int], torch.dtype]]  # by the name of a tensor

_verified: set[tuple[Any, ...]] = set()  # tensors that this process has checked, by their file, its time and size


def keep(
    path: Path, tensors: Mapping[str, torch.Tensor], named: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` to `path` as safetensors with their digests, whole or not at all.

    Raises:
        MachineError: When the file can't be written; the message begins with `named`.
    """
    tensors = {name: on_host(tensor.detach()).contiguous() for name, tensor in tensors.items()}
    digests = json.dumps({name: _digest(tensor) for name, tensor in tensors.items()})
    try:
        with written_whole(path) as scratch:
            save_file(dict(tensors), scratch, {**(metadata or {}), DIGEST: digests})
        _verified.update(_stamp(path, name) for name in tensors)
    except (SafetensorError, OSError) as error:
        raise MachineError(f"{named} can't be written ({reason_of(error)}); free some space") from None


def require(path: Path, shapes: Shapes) -> dict[str, str]:
    """Check the header of a safetensors file, and return its metadata without the digests.

    Args:
        path: The file.
        shapes: The shape and the dtype of each tensor that it has to hold, and no other.

    Raises:
        OSError, ValueError, SafetensorError: When the file is damaged or holds other tensors.
    """
    require_regular(path)
    with safe_open(path, framework="pt") as stored:
        names = set(stored.keys())
        for name, (shape, dtype) in shapes.items():
            if name not in names:
                raise ValueError(f"it has no {name}")
            part = stored.get_slice(name)
            if list(part.get_shape()) != list(shape) or part.get_dtype() != NAMES[dtype]:
                raise ValueError(f"{name} is {part.get_dtype()} {list(part.get_shape())}, and not {list(shape)}")
        if names - shapes.keys():
            raise ValueError(f"it holds {min(names - shapes.keys())} too")
        return {name: value for name, value in (stored.metadata() or {}).items() if name != DIGEST}


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    require_regular(path)
    with safe_open(path, framework="pt") as stored:
        return dict(stored.metadata() or {})


def read(path: Path, name: str) -> torch.Tensor:
    """Return a tensor of a safetensors file.

    Once in a process its digest is compared; in files without digests, numbers have to be finite.

    Raises:
        OSError, ValueError, SafetensorError: When the file is damaged.
    """
    stamp = _stamp(path, name)
    with safe_open(path, framework="pt") as stored:
        tensor: torch.Tensor = stored.get_tensor(name)
        if stamp in _verified:
            return tensor
        digests = json.loads((stored.metadata() or {}).get(DIGEST, "{}"))
    if not isinstance(digests, dict):
        raise ValueError("its digests are no object")
    if name in digests:
        if digests[name] != _digest(tensor):
            raise ValueError(f"{name} is not what was written")
    elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ValueError(f"{name} has NaN or infinite numbers")
    _verified.add(stamp)
    return tensor


def _stamp(path: Path, name: str) -> tuple[Any, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, name


def read_all(path: Path, shapes: Shapes) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file; see `require` and `read` for what is checked."""
    require(path, shapes)
    return {name: read(path, name) for name in shapes}


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()[:32]
