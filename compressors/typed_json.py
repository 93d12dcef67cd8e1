"""Turn JSON values into the types that annotations name, and refuse all others.

Cached files are read with it. A key that a dataclass doesn't have is left out, so that another version's file is read.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def typed(cls: type[T], value: Any, where: str = "") -> T:
    """Return `value` as an instance of `cls`: a number, text, a tuple, a mapping, or a dataclass of such fields.

    Args:
        cls: The type, also a generic one such as `tuple[float, ...]`.
        value: The JSON value.
        where: The name of the value, for messages.

    Raises:
        ValueError: When the value has another type, or a field is missing.
    """
    return typing.cast(T, _typed(cls, value, where or getattr(cls, "__name__", "value")))


def _typed(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _one_of(arguments, value, where)
    if origin in (tuple, list, Sequence):
        return _sequence(origin, arguments, value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _refused(where, "an object", value)
        return {str(name): _typed(arguments[1], one, f"{where}.{name}") for name, one in value.items()}
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    return _plain(kind, value, where)


def _plain(kind: Any, value: Any, where: str) -> Any:
    if kind in (None, types.NoneType):
        if value is not None:
            raise _refused(where, "null", value)
        return None
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _refused(where, "a number", value)
        return float(value)
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _refused(where, "a whole number", value)
        return value
    if kind in (str, bool):
        if not isinstance(value, kind):
            raise _refused(where, "a text" if kind is str else "true or false", value)
        return value
    raise TypeError(f"{where}: no JSON value is a {kind}")


def _one_of(kinds: Sequence[Any], value: Any, where: str) -> Any:
    for kind in kinds[:-1]:
        try:
            return _typed(kind, value, where)
        except ValueError:
            continue
    if value is None and types.NoneType in kinds:
        return None
    return _typed(kinds[0] if kinds[-1] is types.NoneType else kinds[-1], value, where)


def _sequence(origin: Any, kinds: Sequence[Any], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _refused(where, "a list", value)
    if origin is not tuple or kinds[-1] is Ellipsis:
        kinds = [kinds[0]] * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{where} has {len(value)} entries, and not {len(kinds)}")
    entries = [
        _typed(kind, one, f"{where}[{place}]") for place, (kind, one) in enumerate(zip(kinds, value, strict=True))
    ]
    return entries if origin is list else tuple(entries)


def _dataclass(cls: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _refused(where, "an object", value)
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in value:
            values[field.name] = _typed(_hints(cls)[field.name], value[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} has no {field.name}")
    return cls(**values)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _refused(where: str, wanted: str, value: Any) -> ValueError:
    text = repr(value)
    return ValueError(f"{where} is {text if len(text) <= 40 else f'{text[:40]}…'}, and not {wanted}")
