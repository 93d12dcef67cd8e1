"""Reads study files and the files that their `defaults` name, and refuses lists that Hydra could not compose.

An entry is taken as it is written: `tracking: off` names the file off.yaml, although YAML reads `off` as false.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from search.config import references, yaml_files
from search.config.spelling import nearest
from search.config.study_file import StudyFile
from search.errors import ConfigError

SELF = "_self_"
EXPERIMENTS = "experiments"
KEYWORDS = ("optional", "override")
PACKAGES = ("_global_", "_group_", "_here_")
MOST = 500  # files of one study
HINT = "write a list, as in defaults: [_base, {model: smollm2-135m}, _self_]"
NULL, TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a defaults list.

    Attributes:
        text: The entry as people write it.
        name: The name of the file, the names of several, or None for none.
        group: The config group; None for a file that is named without one.
        package: Where the file's values go; None for where its group is.
        keywords: `optional` and `override`, where they are given.
    """

    text: str
    name: str | tuple[str, ...] | None
    group: str | None = None
    package: str | None = None
    keywords: tuple[str, ...] = ()

    def as_hydra_reads_it(self) -> Any:
        """Return the entry with its names in text, whatever YAML makes of them."""
        at = "" if self.package is None else f"@{self.package}"
        if self.group is None:
            return f"{self.name}{at}"
        name = list(self.name) if isinstance(self.name, tuple) else self.name
        return {" ".join([*self.keywords, f"{self.group}{at}"]): name}


@dataclasses.dataclass(frozen=True)
class StudyPart:
    """A YAML file that is part of a study.

    Attributes:
        shown: The file's name in messages.
        values: Its keys, without `defaults`.
        entries: Its defaults list.
        package: What its `# @package` line says; None where it has none.
    """

    shown: str
    values: Mapping[str, Any]
    entries: tuple[Entry, ...]
    package: str | None


def read(path: Path) -> StudyPart:
    """Read a file of a study.

    Raises:
        ConfigError: It is no YAML mapping, or its defaults list is malformed.
    """
    where = yaml_files.shown(path)
    try:
        yaml_files.read(path)  # within limits, which OmegaConf has not
        text = path.read_text(encoding="utf-8-sig")
        loaded = OmegaConf.load(io.StringIO(text))
        values = OmegaConf.to_container(loaded, resolve=False)
        written = yaml.compose(text, yaml.SafeLoader) if isinstance(values, dict) and "defaults" in values else None
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {_yaml_problem(error)}") from None
    except GrammarParseError as error:
        raise ConfigError(f"{where}: {references.problem(error)}") from None
    except (UnicodeError, ValueError, TypeError, RecursionError, OmegaConfBaseException) as error:
        problem = "is not UTF-8" if isinstance(error, UnicodeError) else "can't be read as YAML with text for its keys"
        raise ConfigError(f"{where}: {problem}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{where}: must be a mapping of keys to values, as in trials: 50")
    if "hydra" in values:
        raise ConfigError(f"{where}: hydra: unknown key; how Hydra itself works is not part of a study")
    entries = _entries(written, where) if written is not None else ()
    values.pop("defaults", None)
    return StudyPart(where, {str(key): value for key, value in values.items()}, entries, _package(text, where))


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "is not YAML"
    line = f"line {mark.line + 1}: " if mark is not None else ""
    return f"{line}{' '.join(str(problem).split())}"


def _package(text: str, where: str) -> str | None:
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            return None
        found = re.match(r"\s*#\s*@package\s+(\S+)\s*$", line)
        if found:
            require_package(found[1], f"{where}: # @package {found[1]}")
            return found[1]
    return None


def require_package(package: str, where: str) -> None:
    """Check that a package is a section of the study file, or one of Hydra's own names.

    Raises:
        ConfigError: It is none.
    """
    first = package.partition(".")[0]
    if first not in (*PACKAGES, *StudyFile.model_fields):
        allowed = [*PACKAGES, *StudyFile.model_fields]
        raise ConfigError(f"{where}: {package!r} is no section of a study file{nearest(first, allowed)}")


# -- one list ------------------------------------------------------------------------------------------------


def _entries(root: yaml.Node, where: str) -> tuple[Entry, ...]:
    node = next((value for key, value in root.value if key.value == "defaults"), None)
    if not isinstance(node, yaml.SequenceNode):
        raise ConfigError(f"{where}: defaults: is {_kind(node)}; {HINT}")
    entries = tuple(_entry(item, f"{where}: defaults: entry {index}") for index, item in enumerate(node.value, 1))
    _require_order(entries, where)
    return entries


def _entry(node: yaml.Node, where: str) -> Entry:
    if isinstance(node, yaml.MappingNode):
        if len(node.value) != 1:
            raise ConfigError(
                f"{where}: names {len(node.value)} groups in one entry; write one in each, as in - model: NAME"
            )
        (key, value), *_ = node.value
        return _group_entry(key, value, where)
    if not isinstance(node, yaml.ScalarNode) or node.tag == NULL or not node.value.strip():
        raise ConfigError(f"{where}: is {_kind(node)}; write the name of a file, or GROUP: NAME")
    name, at, package = node.value.strip().partition("@")
    if at:
        require_package(package, f"{where}: {node.value!r}")
    return Entry(node.value, name, package=package if at else None)


def _group_entry(key: yaml.Node, value: yaml.Node, where: str) -> Entry:
    if not isinstance(key, yaml.ScalarNode) or not key.value.strip():
        raise ConfigError(f"{where}: its group is {_kind(key)}; write the group's name, as in - model: NAME")
    *keywords, place = key.value.split()
    if isinstance(value, yaml.SequenceNode):
        names = [name.value for name in value.value if isinstance(name, yaml.ScalarNode) and name.tag != NULL]
        if len(names) != len(value.value):
            raise ConfigError(f"{where}: {key.value!r}: must list the names of files")
        name: str | tuple[str, ...] | None = tuple(names)
        text = f"{key.value}: [{', '.join(names)}]"
    elif isinstance(value, yaml.ScalarNode):
        name = None if value.tag == NULL else value.value
        text = f"{key.value}: {'null' if name is None else name}"
    else:
        raise ConfigError(f"{where}: {key.value!r}: is {_kind(value)}; write the name of a file of the group, or null")
    for keyword in keywords:
        if keyword not in KEYWORDS:
            hint = nearest(keyword, KEYWORDS)
            raise ConfigError(f"{where}: {text!r}: {keyword!r} is not one of {', '.join(KEYWORDS)}{hint}")
    group, at, package = place.partition("@")
    if at:
        require_package(package, f"{where}: {text!r}")
    if name == "":
        raise ConfigError(f"{where}: {text!r}: names no file; write null for none")
    return Entry(text, name, group, package if at else None, tuple(keywords))


def _require_order(entries: Sequence[Entry], where: str) -> None:
    """Refuse `_self_` twice, a group twice, and an override that is not at the end."""
    seen: set[Any] = set()
    override: Entry | None = None
    for entry in entries:
        own = (SELF,) if entry.name == SELF else (entry.group, entry.package, "override" in entry.keywords)
        if (entry.group is not None or entry.name == SELF) and own in seen:
            what = SELF if entry.name == SELF else f"the group {entry.group}"
            raise ConfigError(f"{where}: defaults: {entry.text!r}: {what} is named twice; keep one of the two")
        seen.add(own)
        if entry.group is not None and "override" in entry.keywords:
            override = entry
        elif override is not None and entry.name != SELF:
            raise ConfigError(
                f"{where}: defaults: {override.text!r}: must come after {entry.text!r}, at the end of the list"
            )


def _kind(node: yaml.Node | None) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if node is None or node.tag == NULL or not node.value.strip():
        return "empty"
    return f"the text {node.value!r}" if node.tag == TEXT else f"{node.value!r}"


# -- all lists of a study ------------------------------------------------------------------------------------


class Parts:
    """The files that a study is composed of, read along the search path when they are first named."""

    def __init__(self, directories: Sequence[Path], choices: Mapping[str, Any]) -> None:
        """Prepare to collect.

        Args:
            directories: The search path.
            choices: What the command line chooses in each group: the name of a file, several, or None.
        """
        self._directories = directories
        self._choices = choices
        self._overrides: dict[tuple[str, str | None], tuple[Entry, str]] = {}
        self._visits = 0
        self.read: dict[str, StudyPart] = {}
        self.chosen: dict[tuple[str, str | None], str] = {}

    def collect(self, study: str) -> None:
        """Read the study's file, and all that it names.

        Raises:
            ConfigError: A file is missing or malformed, or the lists contradict each other.
        """
        for name in _names(self._choices.get(EXPERIMENTS)):  # it comes last, and overrides what the study chooses
            self._visit(f"{EXPERIMENTS}/{name}", [])
        self._visit(study, [])
        for (group, package), (entry, where) in self._overrides.items():
            if (group, package) not in self.chosen:
                raise ConfigError(
                    f"{where}: defaults: {entry.text!r}: overrides nothing: no file chooses {group} before; write "
                    f"{group}: {entry.name}"
                )
        for group, value in self._choices.items():  # those that no defaults list names
            if (group, None) not in self.chosen and group != EXPERIMENTS:
                for name in _names(value):
                    self._visit(f"{group}/{name}", [])

    def find(self, config_path: str) -> Path | None:
        """Return the file of a config path, such as `model/smollm2-135m`, or None where there is none."""
        candidates = (directory / f"{config_path}.yaml" for directory in self._directories)
        return next((path for path in candidates if path.exists() and not path.is_dir()), None)

    def _visit(self, config_path: str, above: list[str]) -> None:
        self._visits += 1
        part = self._part(config_path)
        if config_path in above or self._visits > MOST:
            circle = " → ".join([*above[above.index(config_path) if config_path in above else 0 :], config_path][:8])
            raise ConfigError(f"{part.shown}: defaults: go round in a circle: {circle}")
        base = config_path.rpartition("/")[0]
        for entry in part.entries:
            if entry.group is not None and "override" in entry.keywords:
                self._overrides.setdefault((_joined(base, entry.group), entry.package), (entry, part.shown))
        for entry in reversed(part.entries):  # as Hydra does: what comes later overrides
            if entry.name != SELF and "override" not in entry.keywords:
                for path in self._paths(entry, base, part.shown):
                    self._visit(path, [*above, config_path])

    def _part(self, config_path: str) -> StudyPart:
        if config_path not in self.read:
            path = self.find(config_path)
            assert path is not None
            self.read[config_path] = read(path)
        return self.read[config_path]

    def _paths(self, entry: Entry, base: str, where: str) -> list[str]:
        """Return the config paths that an entry names, after what overrides it."""
        if entry.group is None:
            path = _joined(base, str(entry.name))
            if self.find(path) is None:
                names = self._files(path.rpartition("/")[0])
                raise ConfigError(
                    f"{where}: defaults: {entry.text!r}: no such file; there are {', '.join(names) or 'none'}"
                    f"{nearest(path.rpartition('/')[2], names)}"
                )
            return [path]
        group = _joined(base, entry.group)
        key = (group, entry.package)
        if key in self.chosen:
            raise ConfigError(
                f"{where}: defaults: {entry.text!r}: {self.chosen[key]} chooses {group} too; write "
                f"'override {entry.group}: {entry.name}' at the end of the list"
            )
        self.chosen[key] = where
        name: Any = entry.name
        if entry.package is None and group in self._choices:
            name = self._choices[group]
        elif key in self._overrides:
            entry, where = self._overrides[key]
            name = entry.name
        return [path for one in _names(name) for path in self._files_of(group, one, entry, where)]

    def _files_of(self, group: str, name: str, entry: Entry, where: str) -> list[str]:
        names = self._files(group)
        if "${" in name:  # it is known only when Hydra has composed what it refers to
            return [f"{group}/{one}" for one in names]
        path = f"{group}/{name}"
        if self.find(path) is not None:
            return [path]
        if "optional" in entry.keywords:
            return []
        if not any((directory / group).is_dir() for directory in self._directories):
            groups = sorted({path.name for place in self._directories for path in place.iterdir() if path.is_dir()})
            raise ConfigError(
                f"{where}: defaults: {entry.text!r}: no such group; there are {', '.join(groups)}"
                f"{nearest(group, groups)}"
            )
        raise ConfigError(
            f"{where}: defaults: {entry.text!r}: no such file in {group}; there are {', '.join(names) or 'none'}"
            f"{nearest(name, names)}"
        )

    def _files(self, group: str) -> list[str]:
        found = (path for place in self._directories for path in sorted((place / group).glob("*.yaml")))
        return list(dict.fromkeys(path.stem for path in found if not path.name.startswith("_")))


def _names(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _joined(base: str, name: str) -> str:
    return name.lstrip("/") if name.startswith("/") or not base else f"{base}/{name}"
