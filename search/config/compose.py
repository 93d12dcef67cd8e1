"""Composes a study file from `studies/` with Hydra, and checks it.

All errors are ConfigError: one line with the key, the value that was found and the nearest correct spelling.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from search.config.spelling import nearest
from search.config.study_file import Dimension, Range, StudyFile
from search.config.yaml_files import read, require_readable, shown
from search.errors import ConfigError

PACKAGED = Path(__file__).resolve().parents[2] / "studies"
USER_DIR = Path("studies")
EXPERIMENTS = "experiments"
PRIMARY = "__study__"  # its defaults name the study file, so that Hydra looks for this along its whole search path
MEMBERS = ("Range", "int")
MOST_PROBLEMS = 5  # of a study file that are listed


def studies(config_dir: Path | None = None) -> list[str]:
    """Return the names that `--study` takes: the user's own first, then the packaged ones."""
    return _files("*.yaml", config_dir)


def groups(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Return the config groups along the search path with the names of their files, the user's own first."""
    directories: dict[str, None] = {}
    for directory in _search_path(config_dir):
        directories |= dict.fromkeys(path.name for path in sorted(directory.iterdir()) if path.is_dir())
    return {group: names for group in directories if (names := _files(f"{group}/*.yaml", config_dir))}


def load(study: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> StudyFile:
    """Compose and check a study file.

    Args:
        study: The name of the study file.
        overrides: Hydra's words: KEY=VALUE or GROUP=NAME.
        config_dir: The directory with the user's own files; None: `./studies` where it exists.

    Raises:
        ConfigError: A file, a key or a value is wrong.
    """
    with _composed(study, overrides, config_dir) as (composed, sources):
        values = OmegaConf.to_container(composed, resolve=True)
    return validate(values, f"study {study!r}", sources)


def sweep(overrides: Sequence[str], config_dir: Path | None = None) -> list[list[str]]:
    """Return the overrides of each job of a multirun: the product of the values that each override lists.

    Hydra parses them, so a=1,2, range(22,30,2), choice(x,y) and glob(*) all work.

    Raises:
        ConfigError: An override can't be parsed, or lists no value.
    """
    for override in overrides:
        _require_key_and_value(override)
    try:
        axes = []
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            if not override.is_sweep_override():
                axes.append([override.input_line or ""])
                continue
            if not override.is_discrete_sweep():
                raise ConfigError(f"multirun: {override.input_line}: list its values: a=1,2, range(…) or choice(…)")
            value = override.value()
            if isinstance(value, Glob):
                values = value.filter(_files(f"{override.key_or_group}/*.yaml", config_dir))
            else:
                values = list(override.sweep_string_iterator())
            if not values:
                raise ConfigError(f"multirun: {override.input_line}: matches no value")
            axes.append([f"{override.get_key_element()}={text}" for text in values])
    except HydraException as error:
        raise ConfigError(f"multirun: {_first_lines(error)}") from None
    return [list(words) for words in itertools.product(*axes)]


def as_yaml(study: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> str:
    """Return the composed and checked study file with all its keys, as YAML.

    Raises:
        ConfigError: A file, a key or a value is wrong.
    """
    values = load(study, overrides, config_dir).model_dump(mode="json")
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


@contextlib.contextmanager
def _composed(
    study: str, overrides: Sequence[str], config_dir: Path | None
) -> Iterator[tuple[DictConfig, list[tuple[str, Any]]]]:
    """Yield the composition and its sources: pairs (a file's name or "", its values), the last one first."""
    directories = _search_path(config_dir)
    names = studies(config_dir)
    if study not in names and not any((directory / f"{study}.yaml").is_file() for directory in directories):
        raise ConfigError(f"study {study!r}: no such study file; there are {', '.join(names)}{nearest(study, names)}")
    for override in overrides:
        _require_key_and_value(override)
    plain = [_plain(override, directories, config_dir) for override in overrides]
    chosen = [word.lstrip("+").replace("=", "/", 1) for word in plain if _group_of(word.lstrip("+"), directories)]
    require_readable([study, *chosen], directories)
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name=PRIMARY, node={"defaults": [study, "_self_"]})
    first, *others = directories
    words = [f"hydra.searchpath=[{','.join(directory.as_uri() for directory in others)}]"] if others else []
    words += plain
    try:
        with initialize_config_dir(config_dir=str(first), version_base="1.3", job_name="optuna-search"):
            try:
                composed = compose(config_name=PRIMARY, overrides=words)
            except HydraException as error:
                if "Could not override" not in str(error):
                    raise
                # add a group that the study file has no default for, as `+group=` would
                words = [f"+{word}" if _group_of(word, directories) else word for word in words]
                composed = compose(config_name=PRIMARY, overrides=words)
            loader = GlobalHydra.instance().config_loader()
            used = loader.compute_defaults_list(PRIMARY, words, RunMode.RUN).defaults
        yield composed, [*_overridden(overrides), *_read(used, directories)]
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        if "maximum recursion depth" in str(error):
            raise ConfigError(
                f"study {study!r}: its defaults or values refer to each other in a circle, or are nested too deeply; "
                "correct the study file or the overrides"
            ) from None
        if "Ambiguous value" in str(error):
            word = next((word for word in overrides if "," in word), "")
            raise ConfigError(
                f"override {word!r}: names several values; write key=[a,b] for a list, or run a job for each with "
                "`compress --multirun`"
            ) from None
        raise ConfigError(f"study {study!r}: {_first_lines(error)}{_near_key(error)}") from None


def _overridden(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    return [("", OmegaConf.to_container(OmegaConf.from_dotlist([word.lstrip("+~")]))) for word in reversed(overrides)]


def _read(used: Sequence[Any], directories: Sequence[Path]) -> list[tuple[str, Any]]:
    """Return the composed files and their values, each in its package."""
    sources: list[tuple[str, Any]] = []
    for entry in reversed(used):
        path = next(
            (d / f"{entry.config_path}.yaml" for d in directories if (d / f"{entry.config_path}.yaml").is_file()), None
        )
        if path is None:
            continue
        text, values = path.read_text(encoding="utf-8-sig"), read(path)
        group = entry.config_path.rpartition("/")[0]
        if group and "@package _global_" not in text:
            values = {group: values}
        sources.append((shown(path), values))
    return sources


def _source_of(location: Sequence[Any], sources: Sequence[tuple[str, Any]]) -> str:
    """Return the name of the file that set the value at `location`, or "" for an override or a default."""
    for name, values in sources:
        at = values
        for part in location:
            if (isinstance(at, dict) and part in at) or (isinstance(at, list) and part in range(len(at))):
                at = at[part]
            elif part not in MEMBERS:
                break
        else:
            return name
    return ""


def validate(values: Any, where: str, sources: Sequence[tuple[str, Any]] = ()) -> StudyFile:
    """Check the values of a study file.

    Args:
        values: The sections and keys, as YAML gives them.
        where: What an error message begins with, such as "study 'demo'".
        sources: The composed files as pairs (name, values), last one first; an error then names its file.

    Raises:
        ConfigError: A key or a value is wrong.
    """
    try:
        return StudyFile.model_validate(values)
    except ValidationError as error:
        problems: dict[str, str] = {}  # a union reports one problem per member: the first is enough
        for problem in error.errors():
            if len(problems) >= MOST_PROBLEMS:
                problems.setdefault(_where(problem), "")
            elif _where(problem) not in problems:
                file = _source_of(problem["loc"], sources)
                problems[_where(problem)] = f"{file + ': ' if file else ''}{_explain(problem)}"
        more = f"; and {len(problems) - MOST_PROBLEMS:,} more" if len(problems) > MOST_PROBLEMS else ""
        raise ConfigError(f"{where}: " + "; ".join([*problems.values()][:MOST_PROBLEMS]) + more) from None


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


def _require_key_and_value(override: str) -> None:
    if "=" not in override:
        raise ConfigError(f"override {override!r}: must be KEY=VALUE, for instance trials=50")


def _plain(override: str, directories: Sequence[Path], config_dir: Path | None) -> str:
    """Return an override that sets any key without Hydra's `+`; pydantic then refuses a wrong key by its name."""
    key, _, value = override.partition("=")
    if key.lstrip("+") == EXPERIMENTS:
        return f"+{EXPERIMENTS}={experiment(value, config_dir)}"
    group = _group_of(override, directories)
    if group and value.replace("-", "").replace("_", "").replace(".", "").isalnum() and value != "null":
        names = _files(f"{group}/*.yaml", config_dir)
        if value not in names:
            raise ConfigError(f"{override}: no such file; there are {', '.join(names)}{nearest(value, names)}")
    return override if override[0] in "+~" or group else f"++{override}"


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


def _where(problem: Any) -> str:
    # pydantic adds the members of a union to the location; only keys are plain words
    return ".".join(
        str(part) for part in problem["loc"] if str(part).replace("_", "").isalnum() and part not in MEMBERS
    )


def _explain(problem: Any) -> str:
    where = _where(problem)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(where.rpartition('.')[2], _keys_of_section(problem['loc']))}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "missing":
        message = "is required"
    found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
    return f"{where + ': ' if where else ''}{message}{found}"


def _keys_of_section(location: Sequence[Any]) -> list[str]:
    """Return the keys of the section that holds the key at `location`."""
    section: Any = StudyFile
    for part in location[:-1]:
        field = section.model_fields.get(part) if isinstance(section, type) and issubclass(section, BaseModel) else None
        section = field.annotation if field is not None else None
        if section == Dimension:
            section = Range
    if isinstance(section, type) and issubclass(section, BaseModel):
        return list(section.model_fields)
    return []


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])


def _near_key(error: BaseException) -> str:
    words = str(error).replace("'", " ").split()
    keys = [*StudyFile.model_fields]
    for word in words:
        hint = nearest(word.partition(".")[0], keys)
        if hint and word not in keys:
            return hint
    return ""
