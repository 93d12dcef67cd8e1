"""Read the header of a safetensors file: 8 bytes with its length, little-endian, then JSON.

https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from readers import json_reader
from readers.errors import ReadError
from readers.regular import in_words, open_regular

MOST_BYTES = 100_000_000  # the format's own limit


def read(path: Path) -> dict[str, Any]:
    """Return the entries of a header by the names of the tensors; `__metadata__` is left out.

    Each has a list of sizes as its `shape`, a string as its `dtype`, and `data_offsets` within the file that no other
    tensor shares.

    Raises:
        ReadError: When the file is cut off, or its header breaks a rule of the format.
        OSError: When the file is missing or can't be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise ReadError(f"it holds {size} bytes, which end before its header does")
        if length > MOST_BYTES:
            raise ReadError(f"its header holds {in_words(length)}, and at most {in_words(MOST_BYTES)} are allowed")
        header = json_reader.parse(file.read(length))
    if not isinstance(header, dict):
        raise ReadError("its header is no JSON object")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    ends = []
    for name, entry in entries.items():
        if not _is_whole(entry):
            raise ReadError(f"its header describes {ascii(name)[:100]} by no shape, dtype and offsets")
        ends.append((*entry["data_offsets"], name))
    at = 0
    for begin, end, name in sorted(ends):
        if begin < at or end < begin or end > size - 8 - length:
            raise ReadError(f"its header places {ascii(name)[:100]} upon another tensor or beyond the file's end")
        at = end
    return entries


def _is_whole(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    lists = (entry.get("shape"), entry.get("data_offsets"))
    if not all(isinstance(values, list) and all(_is_size(value) for value in values) for values in lists):
        return False
    return len(entry["data_offsets"]) == 2


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
