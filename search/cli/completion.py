"""Completes studies, groups and the values of keys in a shell."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, ZshComplete, add_completion_class
from pydantic import BaseModel

# A shell adds a space to what it has completed. A key is followed by its value, so that none may come after KEY=.
BASH_ADDS, BASH_LEAVES = "COMPREPLY+=($value)\n", "[[ $value == *= ]] && compopt -o nospace\n"
ZSH_ADDS = "compadd -U -V unsorted -a completions\n"
ZSH_LEAVES = """local -a keys=(${(M)completions:#*=}) others=(${completions:#*=})
        (( ! $#keys )) || compadd -U -V unsorted -S '' -a keys
        (( ! $#others )) || compadd -U -V unsorted -a others
"""


class Bash(BashComplete):
    """Completes KEY=VALUE words in bash, which takes `=` for a word of its own."""

    name = "bash"
    source_template = BashComplete.source_template.replace(BASH_ADDS, f"{BASH_ADDS}            {BASH_LEAVES}")

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the cursor and the one at it, with the pieces of KEY=VALUE put together."""
        words, incomplete = super().get_completion_args()
        self._typed = ""  # what bash has completed already: it wants what comes after
        if incomplete == "=" and words:
            words, incomplete = words[:-1], f"{words[-1]}="
            self._typed = incomplete
        elif len(words) >= 2 and words[-1] == "=":
            self._typed = f"{words[-2]}="
            words, incomplete = words[:-2], f"{words[-2]}={incomplete}"
        whole: list[str] = []
        for word in words:
            if whole and (word == "=" or whole[-1].endswith("=")):
                whole[-1] += word
            else:
                whole.append(word)
        if incomplete.startswith("--") and self._typed:  # click splits --option=value itself
            self._typed = ""
        return whole, incomplete

    def format_completion(self, item: CompletionItem) -> str:
        """Return an item as bash takes it."""
        return f"{item.type},{str(item.value).removeprefix(self._typed)}"


class Zsh(ZshComplete):
    """Completes KEY= in zsh without a space after it."""

    name = "zsh"
    source_template = ZshComplete.source_template.replace(ZSH_ADDS, ZSH_LEAVES)


add_completion_class(Bash)
add_completion_class(Zsh)


def studies(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the studies that begin with what was typed."""
    from search.config import compose

    return _items(compose.studies(_config_dir(context)), incomplete)


def words(context: click.Context, parameter: click.Parameter | None, incomplete: str) -> list[CompletionItem]:
    """Return the keys and groups that begin with what was typed; after `=`, the values of the key or group."""
    from search.config import compose
    from search.config.study_file import StudyFile

    groups = compose.groups(_config_dir(context))
    key, equals, _ = incomplete.partition("=")
    if equals:
        known = groups.get(key) or _values(_field(StudyFile, key.split(".")))
        return _items([f"{key}={value}" for value in known], incomplete)
    return _items([*(f"{group}=" for group in groups), *(f"{name}=" for name in _keys(StudyFile, ""))], incomplete)


def one_of(values: Iterable[Any]) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return a function that completes one of `values`."""
    return lambda context, parameter, incomplete: _items(map(str, values), incomplete)


def _config_dir(context: click.Context) -> Path | None:
    given = context.params.get("config_dir")
    return given if isinstance(given, Path) and given.is_dir() else None


def _items(values: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(value) for value in dict.fromkeys(values) if value.startswith(incomplete)]


def _sections(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _keys(section: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, field in section.model_fields.items():
        below = _sections(field.annotation)
        if below is None:
            yield f"{prefix}{name}"
        else:
            yield from _keys(below, f"{prefix}{name}.")


def _field(section: type[BaseModel] | None, path: list[str]) -> tuple[str, str, Any]:
    """Return the section's name, the key's and its type; empty ones where there is no such key."""
    above = ""
    for name in path[:-1]:
        field = None if section is None else section.model_fields.get(name)
        section, above = (None if field is None else _sections(field.annotation)), name
    field = None if section is None else section.model_fields.get(path[-1])
    return above, path[-1], None if field is None else field.annotation


def _values(field: tuple[str, str, Any]) -> list[str]:
    """Return the values that a key can have, as far as they can be listed."""
    from compressors.choices import DTYPES, PRECISIONS, SCHEMES
    from compressors.plan import CHOICES
    from evaluator import backends
    from search.config.compression import METHODS

    section, name, annotation = field
    listed: dict[tuple[str, str], Iterable[Any]] = {
        ("space", "precision"): PRECISIONS,
        ("compression", "scheme"): SCHEMES,
        ("compression", "dtype"): DTYPES,
        ("compression", "method"): METHODS,
        ("evaluation", "backend"): ("auto", *backends.names()),
        ("evaluation", "device"): ("auto", "cpu", "cuda", "mps"),
    }
    if (section, name) in listed:
        return [str(value) for value in listed[section, name]]
    if section in ("space", "compression") and name in CHOICES:
        return [str(value) for value in CHOICES[name].values]
    return _literals(annotation)


def _literals(annotation: Any) -> list[str]:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    if annotation is bool:
        return ["true", "false"]
    if origin in (typing.Union, types.UnionType):
        return [value for one in typing.get_args(annotation) for value in _literals(one)]
    return []
