"""Read JSON from outside, with limits on size and depth, and without duplicate keys."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from readers.errors import ReadError
from readers.regular import read_bytes

MOST_BYTES = 64_000_000
MOST_DEPTH = 50
TOO_DEEP = f"it is nested more than {MOST_DEPTH} levels deep"


def read(path: Path, *, most: int = MOST_BYTES, finite: bool = True, mark: bool = True, follow: bool = True) -> Any:
    """Return the values of a UTF-8 JSON file.

    Args:
        path: The file.
        most: The largest size in bytes.
        finite: Whether NaN and infinity are refused.
        mark: Whether a byte order mark is accepted; transformers, for one, reads no file that has one.
        follow: Whether the file may be a symbolic link.

    Raises:
        ReadError: When the file is no regular file, is too large, or `parse` refuses its text.
        OSError: When it is missing or can't be read.
    """
    data = read_bytes(path, most, follow=follow)
    try:
        text = data.decode("utf-8-sig" if mark else "utf-8")
    except UnicodeDecodeError:
        raise ReadError("it is not UTF-8") from None
    if text.startswith("\ufeff"):
        raise ReadError("it begins with a byte order mark, which not every reader accepts; save it as UTF-8 without")
    return parse(text, finite=finite)


def parse(text: str | bytes, *, finite: bool = True) -> Any:
    """Return the values of a JSON text.

    Args:
        text: The text.
        finite: Whether NaN and infinity are refused.

    Raises:
        ReadError: When it is not JSON, is nested too deeply, or holds a key twice with different values, half of a
            surrogate pair, or a number that is not finite.
    """
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ReadError(TOO_DEEP) from None
    except ReadError:
        raise
    except ValueError as error:  # not JSON, not UTF-8, or an integer of thousands of digits
        raise ReadError(" ".join(str(error).split())[:200]) from None
    for value, depth in _walk(values):
        if depth > MOST_DEPTH:
            raise ReadError(TOO_DEEP)
        if finite and isinstance(value, float) and not math.isfinite(value):
            raise ReadError(f"it holds the number {value}, which is not finite")
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ReadError(f"it holds half of a surrogate pair, in {ascii(value)[:60]}")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if values[key] != value:
                raise ReadError(f"it has the key {ascii(key)[:60]} twice, with different values")
    return values


def _walk(values: Any) -> Iterator[tuple[Any, int]]:
    """Yield every value and key with its depth, without recursion."""
    waiting: list[tuple[Iterable[Any], int]] = [([values], 0)]
    while waiting:
        siblings, depth = waiting.pop()
        for value in siblings:
            yield value, depth
            if isinstance(value, dict):
                waiting += [(value.keys(), depth + 1), (value.values(), depth + 1)]
            elif isinstance(value, list):
                waiting.append((value, depth + 1))
