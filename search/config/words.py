"""Reads KEY=VALUE words by Hydra's grammar, and quotes what that grammar has no letters for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from search.config.references import literal
from search.config.spelling import nearest
from search.config.study_file import StudyFile
from search.errors import ConfigError

KEY = re.compile(r"(?:\+{0,2}|~)[A-Za-z_$][\w$.-]*(?:/[\w.-]+)*(?:@[\w.:]*)?", re.ASCII)
FUNCTION = re.compile(r"\w+\s*\(")
BY_COMMAS = re.compile(r"(?:\$\{[^}]*\}|[^,])+|,")
PARTS = re.compile(
    r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|\$\{[^}]*\}|[\[\]{},]|(?:(?!\$\{)[^\[\]{},\"'])+|.", re.DOTALL
)


def word_of(key: str, value: Any) -> str:
    """Return the KEY=VALUE word that sets the key to the very text of `value`, whatever characters it has."""
    text = literal(str(value))
    return f"{key}={value if isinstance(value, int) else QuotedString(text=text, quote=Quote.double).with_quotes()}"


def quoted(value: Any) -> str:
    """Return a value as Hydra's grammar reads it within a mapping: a text in quotes."""
    if isinstance(value, str):
        return str(QuotedString(text=value, quote=Quote.double).with_quotes())
    return "null" if value is None else str(value)


def readable(word: str) -> str:
    """Return a KEY=VALUE word with its value, or the elements of a list, in quotes where Hydra's grammar wants them.

    Raises:
        ConfigError: It is no such word, and quotes would not make it one.
    """
    key, equals, value = word.partition("=")
    if not equals:
        raise ConfigError(f"override {word!r}: must be KEY=VALUE, for instance trials=50")
    if not KEY.fullmatch(key) or re.split(r"[./@]", key.lstrip("+~"))[0] == "hydra":
        known = nearest(key.lstrip("+~").partition(".")[0], list(StudyFile.model_fields))
        raise ConfigError(f"override {word!r}: unknown key{known}")
    for candidate in (value, _quoted(value)):
        if parsed(f"{key}={candidate}") is not None:
            return f"{key}={candidate}"
    raise ConfigError(
        f"override {word!r}: its value can't be read; close its brackets, braces and quotes, or put all of it in "
        f"quotes: '{key}=\"VALUE\"'"
    )


def parsed(word: str) -> Override | None:
    """Return what Hydra reads in a word, or None where it reads nothing."""
    try:
        override = OverridesParser.create().parse_override(word)
        if not override.is_sweep_override():
            override.value()
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError):
        return None
    return override


def _quoted(value: str) -> str:
    if value[:1] in ("'", '"') or FUNCTION.match(value):
        return value
    if value[:1] in ("[", "{"):
        return "".join(_element(part) for part in PARTS.findall(value))
    return "".join(part if part == "," else _in_quotes(part) for part in BY_COMMAS.findall(value))


def _element(part: str) -> str:
    """Return a piece of a list or a mapping, in quotes where it is a text that needs them."""
    if part in "[]{}," or part[:1] in "\"'" or not part.strip():
        return part
    key, colon, value = part.partition(":")
    if colon and key.strip().replace("_", "").isalnum() and value[:1] in ("", " "):
        return f"{key}{colon}{' ' if value.strip() else ''}{_in_quotes(value.strip())}"
    return _in_quotes(part.strip())


def _in_quotes(text: str) -> str:
    if not text or parsed(f"x={text}") is not None:
        return text
    return str(QuotedString(text=text, quote=Quote.double).with_quotes())


def jobs(overrides: Sequence[str], files: Callable[[str], list[str]]) -> list[list[str]]:
    """Return the words of each job of a multirun: the product of the values that each word lists.

    Args:
        overrides: KEY=VALUE words; a=1,2, range(22,30,2), choice(x,y) and glob(*) list values.
        files: A function that returns the names of a group's files.

    Raises:
        ConfigError: A word can't be read, or lists no value.
    """
    axes = []
    for word in map(readable, overrides):
        override = parsed(word)
        if override is None or not override.is_sweep_override():
            axes.append([word])
            continue
        if not override.is_discrete_sweep():
            raise ConfigError(f"multirun: {word}: list its values: a=1,2, range(…) or choice(…)")
        value = override.value()
        try:
            if isinstance(value, Glob):
                values = value.filter(files(override.key_or_group))
            else:
                values = list(override.sweep_string_iterator())
        except (HydraException, ValueError, TypeError):
            values = []
        if not values:
            raise ConfigError(f"multirun: {word}: matches no value")
        axes.append([f"{override.get_key_element()}={text}" for text in values])
    return [list(words) for words in itertools.product(*axes)]
