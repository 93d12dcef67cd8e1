"""Composes a study file from `studies/` with Hydra, and checks it.

All errors are ConfigError: one line with the key, the value that was found and the nearest correct spelling.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from search import secrets
from search.config import references, words
from search.config.defaults import EXPERIMENTS, Parts
from search.config.goal import GoalSection
from search.config.spelling import nearest
from search.config.study_file import StudyFile
from search.config.validation import validate
from search.errors import ConfigError

PACKAGED = Path(__file__).resolve().parents[2] / "studies"
DEMO = "demo"
# the studies of the package, which are no one's own in a checkout
SHIPPED = (DEMO, "exaone4-1.2b", "exaone4-1.2b-contest")
USER_DIR = Path("studies")
PRIMARY = "__study__"  # its defaults name the study file
FILE = "__file__"  # the study file itself, whatever characters its name has
OPEN = "???"  # a value that is mandatory and not given
COMPOSING = (HydraException, OmegaConfBaseException, ValueError, TypeError, AssertionError, RecursionError)
LISTS = ("evaluation.perf",)  # keys whose values are lists of sections
WHOLE = {"goal": GoalSection}  # sections whose keys exclude each other: one that is given replaces what files say


def studies(config_dir: Path | None = None) -> list[str]:
    """Return the names that `--study` takes: the user's own first, then the packaged ones."""
    return _files("*.yaml", config_dir)


@dataclasses.dataclass(frozen=True)
class Default:
    """The study that is taken where none is named, and why it is that one, in a few words."""

    name: str
    why: str


def default_study(config_dir: Path | None = None) -> Default:
    """Return the study to take where none is named: the user's own where there is one alone, else the demo."""
    mine = config_dir if config_dir is not None else USER_DIR
    packaged = PACKAGED.resolve() == mine.resolve()
    own = [
        name for name in (_files("*.yaml", config_dir) if mine.is_dir() else []) if (mine / f"{name}.yaml").is_file()
    ]
    own = [name for name in own if not (packaged and name in SHIPPED)]
    if len(own) == 1:
        return Default(own[0], f"the only one in {mine}; --study names another")
    if len(own) > 1:
        return Default(DEMO, f"as none is named; {mine} holds {', '.join(own)}: choose one with --study")
    return Default(DEMO, "as none is named; --study names another")


def groups(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Return the config groups along the search path with the names of their files, the user's own first."""
    directories: dict[str, None] = {}
    for directory in _search_path(config_dir):
        directories |= dict.fromkeys(path.name for path in sorted(directory.iterdir()) if path.is_dir())
    return {group: names for group in directories if (names := _files(f"{group}/*.yaml", config_dir))}


def load(
    study: str,
    overrides: Sequence[str] = (),
    config_dir: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> StudyFile:
    """Compose and check a study file.

    Args:
        study: The name of the study file.
        overrides: Hydra's words: KEY=VALUE or GROUP=NAME.
        config_dir: The directory with the user's own files; None: `./studies` where it exists.
        options: Values by their dotted keys, which are taken as they are and come last.

    Raises:
        ConfigError: A file, a key or a value is wrong.
    """
    composed, sources = _composed(study, overrides, config_dir)
    where = f"study {study!r}"
    written = OmegaConf.to_container(composed, resolve=False)
    for key, value in (options or {}).items():
        _set(written, key, references.literal(value) if isinstance(value, str) else value)
    if open_keys := list(_open(written)):
        raise ConfigError(f"{where}: {', '.join(open_keys)}: left open with ???; say {open_keys[0]}=VALUE")
    values = references.resolved(composed, where)
    for key, value in (options or {}).items():
        _set(values, key, value)
    if isinstance(values.get("storage"), str):
        secrets.remember_url(values["storage"])
    file = validate(values, where, [*_given(options or {}), *sources])
    file.refer(references.of(written))
    return file


def _set(values: Any, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[name] = value


def _open(value: Any, key: str = "") -> Iterator[str]:
    """Yield the keys that a file leaves to the command line, as Hydra's files do."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _open(inner, f"{key}.{name}".lstrip("."))
    elif value == OPEN or (isinstance(value, list) and any(True for inner in value for _ in _open(inner, key))):
        yield key


def _given(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    values: dict[str, Any] = {}
    for key in options:
        _set(values, key, None)
    return [("", values)]


def sweep(overrides: Sequence[str], config_dir: Path | None = None) -> list[list[str]]:
    """Return the overrides of each job of a multirun: the product of the values that each override lists.

    Raises:
        ConfigError: An override can't be parsed, or lists no value.
    """
    return words.jobs(overrides, lambda group: _files(f"{group}/*.yaml", config_dir))


def as_yaml(study: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> str:
    """Return the composed and checked study file with all its keys, as YAML.

    Raises:
        ConfigError: A file, a key or a value is wrong.
    """
    return str(yaml.safe_dump(load(study, overrides, config_dir).shown(), sort_keys=False, allow_unicode=True))


def restored(values: Mapping[str, Any], where: str) -> StudyFile:
    """Check the values of a study file that were stored, with `${oc.env:NAME}` in place of what the environment holds.

    Raises:
        ConfigError: A key or a value is wrong, or a variable is not set.
    """
    file = validate(references.resolved(OmegaConf.create(dict(values)), where), where)
    file.refer(references.of(values))
    return file


def _composed(
    study: str, overrides: Sequence[str], config_dir: Path | None
) -> tuple[DictConfig, list[tuple[str, Any]]]:
    """Return the composition and its sources: pairs (a file's name or "", its values), the last one first."""
    directories = _search_path(config_dir)
    names = studies(config_dir)
    if study not in names and not any((directory / f"{study}.yaml").is_file() for directory in directories):
        raise ConfigError(f"study {study!r}: no such study file; there are {', '.join(names)}{nearest(study, names)}")
    choices: dict[str, Any] = {}
    read = [_plain(override, directories, config_dir, choices) for override in overrides]
    parts = Parts(directories, choices)
    parts.collect(study)
    with _stored(study, parts):
        appended = [group for group in choices if (group, None) not in parts.chosen]
        read = [f"+{word}" if word.partition("=")[0] in appended else word for word in read]
        try:
            composed = _hydra(read)
        except COMPOSING as error:
            raise ConfigError(_explain_failure(study, overrides, read, error)) from None
        used = GlobalHydra.instance().config_loader().compute_defaults_list(PRIMARY, read, RunMode.RUN).defaults
    return composed, [*_overridden(read), *_read(used, study, parts)]


def _hydra(read: Sequence[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    initialize(config_path=None, version_base="1.3", job_name="optuna-search")
    composed: DictConfig = compose(config_name=PRIMARY, overrides=list(read))
    return composed


@contextlib.contextmanager
def _stored(study: str, parts: Parts) -> Iterator[None]:
    """Hold the files in Hydra's ConfigStore, so that it composes what was read and checked here."""
    store = ConfigStore.instance()
    before = dict(store.repo)
    store.store(name=PRIMARY, node={"defaults": [study if "/" in study else FILE, "_self_"]})
    for config_path, part in parts.read.items():
        group, _, name = config_path.rpartition("/")
        defaults = {"defaults": [entry.as_hydra_reads_it() for entry in part.entries]} if part.entries else {}
        node = {**defaults, **part.values}
        store.store(name=name, node=node, group=group or None, package=part.package)
        if config_path == study:
            store.store(name=FILE, node=node, package=part.package)
    try:
        yield
    finally:
        store.repo.clear()
        store.repo.update(before)


def _explain_failure(study: str, overrides: Sequence[str], read: Sequence[str], error: BaseException) -> str:
    """Say what Hydra refuses: a word of the command line where it composes without that, else the study itself."""
    for override, word in zip(overrides, read, strict=True):
        others = [other for other in read if other != word]
        try:
            _hydra(others)
        except COMPOSING:
            continue
        key = override.partition("=")[0]
        return f"override {override!r}: can't be set: {key.lstrip('+~')!r} is no section, or is of another kind"
    return f"study {study!r}: {references.problem(error)}"


def _overridden(read: Sequence[str]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for word in reversed(read):
        override = words.parsed(word)
        if override is not None and not override.is_delete():
            values: dict[str, Any] = {}
            _set(values, override.key_or_group, override.value())
            found.append(("", values))
    return found


def _read(used: Sequence[Any], study: str, parts: Parts) -> list[tuple[str, Any]]:
    """Return the composed files and their values, each in its package."""
    sources: list[tuple[str, Any]] = []
    for entry in reversed(used):
        part = parts.read.get(study if entry.config_path == FILE else entry.config_path)
        if part is not None:
            values: dict[str, Any] = dict(part.values)
            for section in reversed([name for name in (entry.package or "").split(".") if name]):
                values = {section: values}
            sources.append((part.shown, values))
    return sources


def _search_path(config_dir: Path | None) -> list[Path]:
    mine = config_dir if config_dir is not None else USER_DIR
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such directory")
    directories = [mine.resolve()] if mine.is_dir() else []
    return directories if PACKAGED in directories else [*directories, PACKAGED]


def _files(pattern: str, config_dir: Path | None) -> list[str]:
    stems: dict[str, None] = {}
    for directory in _search_path(config_dir):
        for path in sorted(directory.glob(pattern)):
            if not path.name.startswith("_"):
                stems.setdefault(path.stem)
    return list(stems)


def _plain(override: str, directories: Sequence[Path], config_dir: Path | None, choices: dict[str, Any]) -> str:
    """Return a word as Hydra takes it, without the `+` that it wants for new keys; pydantic refuses a wrong key.

    A word that chooses files of a group adds them to `choices`.
    """
    key, equals, value = override.partition("=")
    if equals and key.lstrip("+") == EXPERIMENTS:
        choices[EXPERIMENTS] = experiment(value, config_dir)
        return words.word_of(f"+{EXPERIMENTS}", choices[EXPERIMENTS])
    if key.lstrip("+") in LISTS and value.startswith("{"):  # Hydra refuses an object in place of a list
        override = f"{key}=[{value}]"
    if key.lstrip("+") in WHOLE:
        override = _whole(override, WHOLE[key.lstrip("+")])
    group = _group_of(override, directories) if equals else None
    if group is None or "@" in key or key[:1] in ("", "+", "~"):
        word = words.readable(override)
        _require_one_value(override, word)
        return word if group or word[0] in "+~" else f"++{word}"
    names = _files(f"{group}/*.yaml", config_dir)
    if value not in names:
        word = words.readable(override)
        read = words.parsed(word)
        chosen = None if read is None or read.is_sweep_override() else read.value()
        if isinstance(chosen, dict):
            return word
        _require_one_value(override, word)
        for name in chosen if isinstance(chosen, list) else [] if chosen is None else [str(chosen)]:
            if name not in names:
                raise ConfigError(f"{override}: no such file; there are {', '.join(names)}{nearest(str(name), names)}")
        choices[group] = str(chosen) if isinstance(chosen, str) else chosen
        return words.word_of(group, chosen) if isinstance(chosen, str) else word
    choices[group] = value
    return words.word_of(group, value)


def _whole(override: str, section: type[BaseModel]) -> str:
    """Return a word that gives a section by its keys, with null for those that it does not name."""
    key, _, _ = override.partition("=")
    read = words.parsed(words.readable(override)) if "=" in override else None
    given = None if read is None or read.is_sweep_override() else read.value()
    if not isinstance(given, dict):
        return override
    pairs = [f"{name}: {words.quoted(given.get(name))}" for name in {**given, **dict.fromkeys(section.model_fields)}]
    return f"{key}={{{', '.join(pairs)}}}"


def _require_one_value(override: str, word: str) -> None:
    read = words.parsed(word)
    if read is not None and read.is_sweep_override():
        raise ConfigError(
            f"override {override!r}: names several values; write key=[a,b] for a list, or run a job for each with "
            "`compress --multirun`"
        )


def _group_of(override: str, directories: Sequence[Path]) -> str | None:
    group = override.partition("=")[0].partition("@")[0]
    return group if any((directory / group).is_dir() for directory in directories) else None


def experiment(name: str, config_dir: Path | None = None) -> str:
    """Return the name of the experiment file that `name` stands for.

    `02-05_drop-layers-26` may also be written `drop-layers-26` or `drop_layers_26`, and as `drop_layers` where no other
    file begins with it.

    Raises:
        ConfigError: No file matches, or several do.
    """
    files = _files(f"{EXPERIMENTS}/*.yaml", config_dir)
    if name in files:
        return name
    wanted = _strategy(name)
    for matches in (
        [file for file in files if _strategy(file) == wanted],
        [file for file in files if _strategy(file).startswith(f"{wanted}-")],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ConfigError(f"experiments={name}: could be {' or '.join(matches)}; write one of them")
    near = difflib.get_close_matches(wanted, map(_strategy, files), n=1, cutoff=0.5)
    hint = f"; did you mean {next(file for file in files if _strategy(file) == near[0])!r}?" if near else ""
    raise ConfigError(f"experiments={name}: no such file; there are {', '.join(files) or 'none'}{hint}")


def _strategy(name: str) -> str:
    """Return the strategy of a file named MM-DD_strategy: `02-05_drop_layers-26` → `drop-layers-26`."""
    date, _, rest = name.partition("_")
    return (rest if rest and date.replace("-", "").isdigit() else name).replace("_", "-")
