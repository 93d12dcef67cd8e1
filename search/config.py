"""The study file: Hydra composes it from `studies/`, pydantic checks it.

Knows no Optuna and builds nothing. Errors are ConfigError, one line that names the key, what was found
and the nearest right spelling.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compressors.plan import DROP_FROM, PRECISIONS
from search.errors import ConfigError

PACKAGED = Path(__file__).resolve().parent.parent / "studies"
USER_DIR = Path("studies")


MEMBERS = ("Range", "int")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(Section):
    """Integers from `low` to `high`, both included, in steps. A range may change when a study goes on."""

    low: Annotated[int, Field(ge=1)]
    high: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        if (self.high - self.low) % self.step:
            raise ValueError(f"high ({self.high}) must be low ({self.low}) plus a multiple of step ({self.step})")
        return self


Dimension = Range | Annotated[int, Field(ge=1)] | None  # searched | fixed | as in the base model


class Space(Section):
    num_hidden_layers: Dimension = None
    drop_from: list[str] = ["importance"]
    num_attention_heads: Dimension = None
    num_key_value_heads: Dimension = None
    hidden_size: Dimension = None
    intermediate_size: Dimension = None
    precision: list[str] | None = None  # None: as in the base model

    @field_validator("drop_from", "precision")
    @classmethod
    def _known(cls, names: list[str] | None, info: Any) -> list[str] | None:
        allowed = DROP_FROM if info.field_name == "drop_from" else PRECISIONS
        for name in names or ():
            if name not in allowed:
                raise ValueError(f"{name!r} is not one of {', '.join(allowed)}{_nearest(name, allowed)}")
        if names is not None and (not names or len(set(names)) != len(names)):
            raise ValueError("needs at least one value, and none twice")
        return names


class Model(Section):
    source: str  # a local directory, a hub id, or the name of the embedded model
    revision: str | None = None


class Text(Section):
    """`embedded` is English prose that every CPython ships; otherwise text or JSONL files."""

    calibration: list[str] | Literal["embedded"] = "embedded"
    search: list[str] | Literal["embedded"] = "embedded"
    window: Annotated[int, Field(ge=16)] = 256  # tokens
    calibration_windows: Annotated[int, Field(ge=1)] = 16
    shards: Annotated[int, Field(ge=2)] = 16
    windows_per_shard: Annotated[int, Field(ge=1)] = 1


class WorkloadSection(Section):
    batch_sizes: list[Annotated[int, Field(ge=1)]] = [1]
    prompt_tokens: Annotated[int, Field(ge=1)] = 64
    decode_steps: Annotated[int, Field(ge=4)] = 16
    turns: Annotated[int, Field(ge=4)] = 12
    seed: int = 0


class Evaluation(Section):
    backend: str = "auto"
    device: str = "auto"
    speed: Literal["measured", "predicted"] = "measured"
    workload: WorkloadSection = WorkloadSection()
    compile: bool = False  # torch.compile inside vLLM: slower to start, closer to the server's defaults
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.3
    start_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    call_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    kl_max_mb: Annotated[float, Field(ge=0)] = 1024.0  # of the base model's log-probabilities kept for KL


class ScoreSection(Section):
    weight_perf: Annotated[float, Field(ge=0)] = 0.5
    weight_speed: Annotated[float, Field(ge=0)] = 0.5


class Sampler(Section):
    name: Literal["tpe", "random"] = "tpe"
    n_startup_trials: Annotated[int, Field(ge=1)] = 10


class Pruner(Section):
    name: Literal["wilcoxon", "median", "hyperband", "none"] = "wilcoxon"
    p_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.1
    n_startup_steps: Annotated[int, Field(ge=0)] = 4  # shards before a trial may be pruned
    n_startup_trials: Annotated[int, Field(ge=0)] = 4  # median only
    reduction_factor: Annotated[int, Field(ge=2)] = 3  # hyperband only


class Limits(Section):
    max_size_mb: Annotated[float, Field(gt=0)] | None = None  # of model.safetensors, 1 MB = 1e6 bytes
    max_consecutive_failures: Annotated[int, Field(ge=1)] = 5
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2  # the best so many stay on disk


class Tracking(Section):
    mlflow: bool = True
    experiment: str = "optuna-search"


class StudyFile(Section):
    study_name: Annotated[str, Field(pattern=r"^[^'\"`]+$")]
    trials: Annotated[int, Field(ge=1)] = 20
    seed: Annotated[int, Field(ge=0)] = 0
    storage: str = "sqlite:///outputs/studies.db"
    outputs: Path = Path("outputs")
    model: Model
    space: Space = Space()
    text: Text = Text()
    evaluation: Evaluation = Evaluation()
    score: ScoreSection = ScoreSection()
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
    limits: Limits = Limits()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if self.score.weight_perf + self.score.weight_speed <= 0:
            raise ValueError("score: weight_perf and weight_speed are both 0, so that every trial would score 0")
        return self


def studies(config_dir: Path | None = None) -> list[str]:
    """The names that `--study` takes: the user's own first, then those that come with optuna-search."""
    found: dict[str, None] = {}
    for directory in _search_path(config_dir):
        for path in sorted(directory.glob("*.yaml")):
            if not path.name.startswith("_"):
                found.setdefault(path.stem)
    return list(found)


def load(study: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> StudyFile:
    """The study file `study` with Hydra `overrides` (KEY=VALUE). Raises ConfigError."""
    directories = _search_path(config_dir)
    home = next((d for d in directories if (d / f"{study}.yaml").is_file()), None)
    if home is None:
        names = studies(config_dir)
        raise ConfigError(f"study {study!r}: no such study file; there are {', '.join(names)}{_nearest(study, names)}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r}: must be KEY=VALUE, for instance trials=50")
    others = [d.as_uri() for d in directories if d != home]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(home), version_base="1.3", job_name="optuna-search"):
            search_path = [f"hydra.searchpath=[{','.join(others)}]"] if others else []
            plain = [_forced(override, directories) for override in overrides]
            composed = compose(config_name=study, overrides=[*search_path, *plain])
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"study {study!r}: {_first_lines(error)}{_near_key(error)}") from None
    return validate(values, where=f"study {study!r}")


def validate(values: Any, where: str) -> StudyFile:
    try:
        return StudyFile.model_validate(values)
    except ValidationError as error:
        problems: dict[str, str] = {}  # a union reports one problem per member: the first says enough
        for problem in error.errors():
            problems.setdefault(_where(problem), _explain(problem))
        raise ConfigError(f"{where}: " + "; ".join(problems.values())) from None


def _search_path(config_dir: Path | None) -> list[Path]:
    mine = config_dir if config_dir is not None else USER_DIR
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such directory")
    directories = [mine.resolve()] if mine.is_dir() else []
    return directories if PACKAGED in directories else [*directories, PACKAGED]


def _forced(override: str, directories: Sequence[Path]) -> str:
    """Lets any key be set without Hydra's `+`: a wrong one is then refused by name, with the nearest spelling."""
    key = override.partition("=")[0]
    is_group = any((directory / key.partition("@")[0]).is_dir() for directory in directories)
    return override if override[0] in "+~" or is_group else f"++{override}"


def _where(problem: Any) -> str:
    # pydantic puts the members of a union into the location; keys are plain words
    return ".".join(
        str(part) for part in problem["loc"] if str(part).replace("_", "").isalnum() and part not in MEMBERS
    )


def _explain(problem: Any) -> str:
    where = _where(problem)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(where.rpartition('.')[2], _keys_beside(problem['loc']))}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        message = "is required"
    found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
    return f"{where + ': ' if where else ''}{message}{found}"


def _keys_beside(location: Sequence[Any]) -> list[str]:
    section: Any = StudyFile
    for part in location[:-1]:
        field = section.model_fields.get(part) if isinstance(section, type) and issubclass(section, BaseModel) else None
        section = field.annotation if field is not None else None
        if section == Dimension:
            section = Range
    if isinstance(section, type) and issubclass(section, BaseModel):
        return list(section.model_fields)
    return []


def _nearest(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])


def _near_key(error: BaseException) -> str:
    words = str(error).replace("'", " ").split()
    keys = [*StudyFile.model_fields]
    for word in words:
        hint = _nearest(word.partition(".")[0], keys)
        if hint and word not in keys:
            return hint
    return ""
