"""Reading safetensors headers and writing a file in one pass, tensor by tensor.

The format: 8 bytes with the header's length (little-endian), the JSON header, the tensors one after the other.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compressors.errors import CheckpointError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def shapes(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor, from a header that was checked against the file's size.

    Raises CheckpointError for a file that is corrupt or cut off.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"weights {path}: not a whole safetensors file ({' '.join(str(error).split())}); copy or download it again"
        ) from None
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"weights {path}: {name} has the dtype {entry['dtype']}, which can't be compressed")
        found[name] = (tuple(entry["shape"]), DTYPES[entry["dtype"]])
    return found


def loader(path: Path, name: str) -> Callable[[], torch.Tensor]:
    """Reads one tensor when called; the file is memory-mapped, so that a slice costs no more than its bytes."""

    def load() -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    return load


def header_of(tensors: Mapping[str, Any]) -> bytes:
    """The header of a file that holds these (anything with `shape` and `dtype`), in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write(path: Path, tensors: Mapping[str, Any]) -> str:
    """Write `tensors` (with `shape`, `dtype`, `load()`), one at a time in memory; returns the file's sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(1) as beside:

        def put(data: Any) -> None:
            digested = beside.submit(digest.update, data)  # neither holds the interpreter's lock
            file.write(data)
            digested.result()

        header = header_of(tensors)
        put(struct.pack("<Q", len(header)))
        put(header)
        for name, lazy in tensors.items():
            tensor = lazy.load().detach().cpu().contiguous()
            if tuple(tensor.shape) != tuple(lazy.shape) or tensor.dtype != lazy.dtype:
                raise CheckpointError(
                    f"{name}: announced as {tuple(lazy.shape)} {lazy.dtype}, and is "
                    f"{tuple(tensor.shape)} {tensor.dtype}"
                )
            put(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def keep(path: Path, tensors: Mapping[str, torch.Tensor], named: str) -> None:
    """Write what was worked out beside its place, and rename it. Raises CheckpointError, which begins with `named`."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as scratch:
            written = Path(scratch, path.name)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, written)
            written.replace(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{named} can't be written ({error}); free some space") from None
