"""Resolves `${…}` in a study file, and keeps what refers to the environment as it was written.

The environment may hold a secret. What a study stores, sends or prints has `${oc.env:NAME}` where the file has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf import errors as omegaconf_errors

from search import secrets
from search.errors import ConfigError

Location = tuple[str | int, ...]
TO_ENVIRONMENT = re.compile(r"oc\.env\s*:\s*([A-Za-z_]\w*)")
REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # not after an odd number of backslashes
TO_KEY = re.compile(r"(?<!\\)\$\{\s*([A-Za-z_][\w.]*)\s*\}")
DEPTH = 8  # references to references


def resolved(composed: DictConfig, where: str) -> Any:
    """Return the values of a composition with all references resolved.

    Raises:
        ConfigError: One leads nowhere.
    """
    try:
        return OmegaConf.to_container(composed, resolve=True)
    except (omegaconf_errors.OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{where}: {problem(error)}") from None


def problem(error: BaseException) -> str:
    """Say what is wrong with a value or a reference that OmegaConf refuses."""
    key = getattr(error, "full_key", None) or ""
    at = f"{key}: " if key else ""
    missing = re.search(r"[Ee]nvironment variable '([^']*)' not found", str(error))
    if missing:
        return f"{at}the environment variable {missing[1]} is not set; set it, or write ${{oc.env:{missing[1]},…}}"
    if isinstance(error, omegaconf_errors.InterpolationKeyError):
        named = re.search(r"[Ii]nterpolation key '([^']*)'", str(error))
        return f"{at}refers to the key {named[1] if named else ''!r}, which does not exist"
    if isinstance(error, omegaconf_errors.UnsupportedInterpolationType):
        return f"{at}refers to something other than a key or ${{oc.env:NAME}}"
    if isinstance(error, omegaconf_errors.GrammarParseError):
        return f"{at}its reference can't be read; write ${{KEY}} or ${{oc.env:NAME}}, or \\${{ for the characters"
    if isinstance(error, omegaconf_errors.InterpolationResolutionError | RecursionError):
        return f"{at}holds a reference that can't be resolved, such as one to itself"
    return f"{at}its files give a key a value of another kind, such as a text where others have a section"


def of(written: Any) -> dict[Location, str]:
    """Return the values that refer to the environment, as they are written, by their places."""
    found = {}
    for location, text in _texts(written, ()):
        expanded = _expanded(text, written)
        names = TO_ENVIRONMENT.findall(expanded)
        if names and REFERENCE.search(expanded):
            found[location] = expanded
            for name in names:
                secrets.remember_reference(name)
    return found


def _expanded(text: str, written: Any) -> str:
    """Return a text with references to keys replaced by what these are written as."""
    for _ in range(DEPTH):
        after = TO_KEY.sub(lambda match: _at(match[1], written, match[0]), text)
        if after == text:
            break
        text = after
    return text


def _at(key: str, written: Any, otherwise: str) -> str:
    for part in key.split("."):
        if not isinstance(written, Mapping) or part not in written:
            return otherwise
        written = written[part]
    return otherwise if isinstance(written, Mapping | list) else str(written)


def _texts(values: Any, location: Location) -> Iterator[tuple[Location, str]]:
    if isinstance(values, str):
        yield location, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _texts(value, (*location, key))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _texts(value, (*location, index))


def restored(text: str) -> str:
    """Return a stored text with what it refers to, or the text itself where that is not known here."""
    try:
        return str(OmegaConf.to_container(OmegaConf.create({"text": text}), resolve=True)["text"])  # type: ignore[call-overload, index]
    except (omegaconf_errors.OmegaConfBaseException, ValueError, TypeError, RecursionError):
        return text


def literal(text: str) -> str:
    """Return a text as OmegaConf has to hold it, so that `${…}` in it is no reference."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)


def put_back(values: Any, references: Mapping[Location, str], location: Location = ()) -> Any:
    """Return the values of a checked study file as they may be stored: with its references, and with masked URLs."""
    if location in references and not isinstance(values, bool | int | float | None):
        return [references[location]] if isinstance(values, list) else references[location]
    if isinstance(values, str):
        return literal(secrets.masked_places(values))
    if isinstance(values, Mapping):
        return {key: put_back(value, references, (*location, key)) for key, value in values.items()}
    if isinstance(values, Sequence):
        return [put_back(value, references, (*location, index)) for index, value in enumerate(values)]
    return values
