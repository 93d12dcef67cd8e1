"""Find the group of a compressed-tensors `quantization_config` that says how a module is quantized."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from readers.errors import ReadError


def group_of(module: str, quantization: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the group that names the module, as one does `lm_head`, else the group of all Linears, else None.

    Raises:
        ReadError: A pattern among the targets is no regular expression.
    """
    groups: list[Mapping[str, Any]] = list((quantization.get("config_groups") or {}).values())
    named = (group for group in groups if is_among(module, group.get("targets") or ()))
    linears = (group for group in groups if "Linear" in (group.get("targets") or ()))
    return next(named, None) or next(linears, None)


def is_among(module: str, names: Iterable[str]) -> bool:
    """Return whether `targets` or `ignore` name a module: by its name, or by `re:` and a pattern of its beginning.

    Raises:
        ReadError: A pattern is no regular expression.
    """
    try:
        return any(re.match(name[3:], module) if name.startswith("re:") else name == module for name in names)
    except re.error as error:
        raise ReadError(
            f"quantization_config holds a pattern that is not a regular expression ({error}); correct it"
        ) from None
