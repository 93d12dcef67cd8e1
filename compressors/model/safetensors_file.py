"""Read safetensors headers, and write a file in one pass, tensor by tensor.

The format: 8 bytes with the header's length (little-endian), the JSON header, then the tensors one after the other.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compressors.errors import CheckpointError, NotFiniteWeights
from compressors.model.finite import flaw_of
from readers import safetensors_header
from readers.errors import ReadError

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
    """Return the shape and dtype of every tensor by name, from a header that is checked against the file's size.

    Raises:
        CheckpointError: For a file that is corrupt, cut off, or holds a dtype that can't be compressed.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
        header = safetensors_header.read(path)
    except (OSError, SafetensorError, ReadError) as error:
        raise CheckpointError(
            f"weights {path}: not a whole safetensors file ({' '.join(str(error).split())}); copy or download it again"
        ) from None
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"weights {path}: {name} has the dtype {entry['dtype']}, which can't be compressed")
        tensors[name] = (tuple(entry["shape"]), DTYPES[entry["dtype"]])
    return tensors


def loader(path: Path, name: str) -> Callable[[], torch.Tensor]:
    """Return a function that reads one tensor; the file is memory-mapped, so a slice costs only its own bytes."""

    def load() -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    return load


def header_of(tensors: Mapping[str, Any]) -> bytes:
    """Return the header of a file that holds `tensors` in this order; each value has a `shape` and a `dtype`."""
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


def write(path: Path, tensors: Mapping[str, Any], *, finite: bool = True) -> str:
    """Write `tensors` one at a time and return the file's sha256; each value has `shape`, `dtype` and `load()`.

    Args:
        path: The file.
        tensors: The tensors by name.
        finite: Whether NaN and infinity are refused.

    Raises:
        CheckpointError: When a loaded tensor has another shape or dtype than it announced, or is not finite.
        OSError: When the file can't be written.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(1) as hashing:

        def put(data: Any) -> None:
            digested = hashing.submit(digest.update, data)  # hashing and writing both release the interpreter's lock
            file.write(data)
            digested.result()

        header = header_of(tensors)
        put(struct.pack("<Q", len(header)))
        put(header)
        for name, lazy in tensors.items():
            tensor = lazy.load().detach().cpu().contiguous()
            if tuple(tensor.shape) != tuple(lazy.shape) or tensor.dtype != lazy.dtype:
                raise CheckpointError(
                    f"{name}: announced as {tuple(lazy.shape)} {lazy.dtype}, but loaded as "
                    f"{tuple(tensor.shape)} {tensor.dtype}"
                )
            flaw = flaw_of(tensor) if finite else None
            if flaw is not None:
                raise NotFiniteWeights(f"weights: {name} {flaw}; nothing was written", name)
            put(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
