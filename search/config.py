"""The study file: Hydra composes it from `studies/`, pydantic checks it.

Knows no Optuna and builds nothing. Errors are ConfigError, one line that names the key, what was found
and the nearest right spelling.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compressors.plan import CHOICES, DROP_FROM, DTYPES, PRECISIONS, SCHEMES
from search.errors import ConfigError

PACKAGED = Path(__file__).resolve().parent.parent / "studies"
USER_DIR = Path("studies")
EXPERIMENTS = "experiments"
PRIMARY = "__study__"  # names the study file, so that it too is looked for along the whole search path
METHODS = {  # of `compress`: the keys of which each needs one
    "drop_layers": ("keep_layers",),
    "prune_heads": ("keep_heads", "keep_kv_heads"),
    "reduce_hidden": ("hidden_size", "target_dim"),
    "reduce_ffn": ("intermediate_size", "target_dim"),
    "quantize": ("scheme",),
    "cast": ("dtype",),
}
HOW = {  # and the keys that it may take beside
    "drop_layers": ("drop_from", "repair"),
    "prune_heads": ("importance", "repair"),
    "reduce_hidden": ("rotation", "repair"),
    "reduce_ffn": ("importance", "repair"),
    "quantize": ("smoothing", "quantizer", "group_size", "keep_16_bit", "lm_head", "kv_cache"),
    "cast": (),
}

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
    importance: list[str] = ["activation"]
    rotation: list[str] = ["none"]
    repair: list[str] = ["none"]
    smoothing: list[str] = ["none"]
    quantizer: list[str] = ["nearest"]
    group_size: list[int] = [0]
    keep_16_bit: Range | Annotated[int, Field(ge=0)] = 0
    lm_head: list[str] = ["16-bit"]
    kv_cache: list[str] = ["auto"]

    @field_validator("drop_from", "precision", *CHOICES)
    @classmethod
    def _known(cls, names: list[Any] | None, info: Any) -> list[Any] | None:
        known: dict[str, Sequence[Any]] = {"drop_from": DROP_FROM, "precision": PRECISIONS, **CHOICES}
        allowed = known[info.field_name]
        for name in names or ():
            if name not in allowed:
                hint = _nearest(name, allowed) if isinstance(name, str) else ""
                raise ValueError(f"{name!r} is not one of {', '.join(map(str, allowed))}{hint}")
        if names is not None and (not names or len(set(names)) != len(names)):
            raise ValueError("needs at least one value, and none twice")
        return names


class Model(Section):
    source: str  # a local directory, a hub id, or the name of the embedded model
    revision: str | None = None
    num_layers: Annotated[int, Field(ge=1)] | None = None  # of the compressed model: a remark, compression decides


class Compression(Section):
    """What `compress` makes of the model by hand; what is null stays as in the base model."""

    method: str | list[str] | None = None
    keep_layers: Annotated[int, Field(ge=1)] | None = None
    drop_from: str | list[Annotated[int, Field(ge=0)]] = "importance"  # or the numbers of the layers that go, from 0
    keep_heads: Annotated[int, Field(ge=1)] | None = None
    keep_kv_heads: Annotated[int, Field(ge=1)] | None = None
    target_dim: Annotated[int, Field(ge=1)] | None = None  # of the one method that is named, reduce_hidden or _ffn
    hidden_size: Annotated[int, Field(ge=1)] | None = None
    intermediate_size: Annotated[int, Field(ge=1)] | None = None
    scheme: str | None = None
    dtype: str | None = None
    importance: str | None = None
    rotation: str | None = None
    repair: str | None = None
    smoothing: str | None = None
    quantizer: str | None = None
    group_size: int | None = None
    keep_16_bit: Annotated[int, Field(ge=0)] | None = None
    lm_head: str | None = None
    kv_cache: str | None = None

    @field_validator("method", "scheme", "dtype", *CHOICES)
    @classmethod
    def _known(cls, value: Any, info: Any) -> Any:
        known: dict[str, Sequence[Any]] = {"method": tuple(METHODS), "scheme": SCHEMES, "dtype": DTYPES, **CHOICES}
        allowed = known[info.field_name]
        for name in value if isinstance(value, list) else () if value is None else (value,):
            if name not in allowed:
                hint = _nearest(name, allowed) if isinstance(name, str) else ""
                raise ValueError(f"{name!r} is not one of {', '.join(map(str, allowed))}{hint}")
        return value

    @field_validator("drop_from")
    @classmethod
    def _drop_from(cls, value: str | list[int]) -> str | list[int]:
        if isinstance(value, list):
            if not value or len(set(value)) != len(value):
                raise ValueError("needs the number of at least one layer, and none twice")
        elif value not in DROP_FROM:
            raise ValueError(
                f"{value!r} is not one of {', '.join(DROP_FROM)}{_nearest(value, DROP_FROM)}, nor a list of layers"
            )
        return value

    @property
    def methods(self) -> list[str]:
        return [self.method] if isinstance(self.method, str) else list(self.method or ())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.scheme and self.dtype:
            raise ValueError(f"scheme is {self.scheme} and dtype {self.dtype}: a model is quantized or cast, not both")
        if not self.methods:
            if self.target_dim is not None:
                raise ValueError("target_dim needs a method, reduce_hidden or reduce_ffn; or say hidden_size")
            return self
        if self.target_dim is not None and {"reduce_hidden", "reduce_ffn"} <= set(self.methods):
            raise ValueError("target_dim is of one of two methods here; say hidden_size and intermediate_size")
        if set(self.methods) == {"drop_layers"} and self.repair == "ridge":
            raise ValueError("repair: ridge has nothing to repair where only layers go; choose stream, or none")
        given = {name for name in type(self).model_fields if getattr(self, name) is not None} - {"method", "drop_from"}
        if isinstance(self.drop_from, list):
            given.add("keep_layers")
        for method in self.methods:
            if not given & set(METHODS[method]):
                raise ValueError(f"method {method} needs {' or '.join(METHODS[method])}")
        for key in sorted(given - {key for method in self.methods for key in (*METHODS[method], *HOW[method])}):
            owner = next(method for method in METHODS if key in (*METHODS[method], *HOW[method]))
            raise ValueError(
                f"{key} belongs to {owner}, and method is {', '.join(self.methods)}; add it there: "
                f"method=[{','.join([*self.methods, owner])}]"
            )
        return self


class PerfPart(Section):
    """A part of Perf: 1/perplexity on the search text, or the accuracy of a task."""

    metric: str = "perplexity"
    weight: Annotated[float, Field(gt=0)] = 1.0
    name: str | None = None  # in tables; by default the file's or the task's
    files: list[str] = []  # multiple_choice: JSONL with question, choices, answer
    task: str | None = None  # lm_eval
    include_path: str | None = None  # lm_eval: the folder of the task's YAML
    limit: Annotated[int, Field(ge=1)] | None = None  # items

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str) -> str:
        allowed = ("perplexity", *task_names())
        if value not in allowed:
            raise ValueError(f"{value!r} is not one of {', '.join(allowed)}{_nearest(value, allowed)}")
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.metric == "multiple_choice" and not self.files:
            raise ValueError("multiple_choice needs files: JSONL with question, choices and answer")
        if self.metric == "lm_eval" and not self.task:
            raise ValueError("lm_eval needs task: a task's name")
        return self


def task_names() -> list[str]:
    """The kinds of task there are: the files of evaluator/tasks."""
    from evaluator import tasks

    return tasks.names()


Texts = list[str] | Literal["embedded"]


class Text(Section):
    """`embedded` is prose that every CPython ships; otherwise .txt and .jsonl files, or hub:ORGANISATION/NAME."""

    calibration: Texts = "embedded"
    search: Texts = "embedded"
    report: Texts | None = "embedded"  # confirms what was found on text that no search saw; null: nothing
    window: Annotated[int, Field(ge=16)] = 256  # tokens
    calibration_windows: Annotated[int, Field(ge=1)] = 16
    moments_windows: Annotated[int, Field(ge=1)] = 32  # of each domain: for what `build.needs_moments`
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
    perf: Annotated[list[PerfPart], Field(min_length=1)] = [PerfPart()]


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


class DistillationSection(Section):
    """See compressors.distillation.settings.Distillation."""

    tokens: Annotated[int, Field(ge=1)] = 2_000_000
    batch_tokens: Annotated[int, Field(ge=1)] = 32_768
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    temperature: Annotated[float, Field(gt=0)] = 1.0
    weight_ce: Annotated[float, Field(ge=0)] = 0.0
    evaluate_every: Annotated[int, Field(ge=1)] = 524_288
    patience: Annotated[int, Field(ge=1)] = 4
    seed: int = 0


class Limits(Section):
    max_size_mb: Annotated[float, Field(gt=0)] | None = None  # of model.safetensors, 1 MB = 1e6 bytes
    max_consecutive_failures: Annotated[int, Field(ge=1)] = 5
    max_zip_mb: Annotated[float, Field(gt=0)] | None = None  # of submit.zip
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2  # the best so many stay on disk


class Export(Section):
    for_transformers: str | None = None  # the version that is to read what export and compress write; null: this one


class Tracking(Section):
    mlflow: bool = True
    experiment: str = "optuna-search"


class StudyFile(Section):
    study_name: Annotated[str, Field(pattern=r"^[^'\"`]+$")]
    experiment_name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None  # of what is made by hand
    description: str | None = None
    trials: Annotated[int, Field(ge=1)] = 20
    seed: Annotated[int, Field(ge=0)] = 0
    storage: str = "sqlite:///outputs/studies.db"
    outputs: Path = Path("outputs")
    model: Model
    compression: Compression = Compression()
    space: Space = Space()
    text: Text = Text()
    evaluation: Evaluation = Evaluation()
    score: ScoreSection = ScoreSection()
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
    limits: Limits = Limits()
    export: Export = Export()
    distillation: DistillationSection = DistillationSection()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if self.score.weight_perf + self.score.weight_speed <= 0:
            raise ValueError("score: weight_perf and weight_speed are both 0, so that every trial would score 0")
        return self

    @model_validator(mode="after")
    def _readable(self) -> Self:
        version = self.export.for_transformers
        if version is not None and "8-bit" in (*self.space.lm_head, self.compression.lm_head):
            from compressors import target  # it imports torch, which no other study file waits for
            from compressors.errors import CheckpointError

            try:
                old = target.in_old_form(version)
            except CheckpointError:  # said where it is exported
                old = False
            if old:
                raise ValueError(
                    f"lm_head: 8-bit beside export.for_transformers: {version}: {target.NO_LM_HEAD}; choose 16-bit, or "
                    "export.for_transformers=null where the server has a newer vLLM"
                )
        return self


# -- composing ------------------------------------------------------------------------------------------------


def studies(config_dir: Path | None = None) -> list[str]:
    """The names that `--study` takes: the user's own first, then those that come with optuna-search."""
    return _files("*.yaml", config_dir)


def groups(config_dir: Path | None = None) -> dict[str, list[str]]:
    """The config groups along the search path and what each offers, the user's own first."""
    found: dict[str, None] = {}
    for directory in _search_path(config_dir):
        found |= dict.fromkeys(path.name for path in sorted(directory.iterdir()) if path.is_dir())
    return {group: names for group in found if (names := _files(f"{group}/*.yaml", config_dir))}


def load(study: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> StudyFile:
    """The study file `study` with Hydra `overrides` (KEY=VALUE, GROUP=NAME). Raises ConfigError."""
    with _composed(study, overrides, config_dir) as (composed, sources):
        values = OmegaConf.to_container(composed, resolve=True)
    return validate(values, f"study {study!r}", sources)


def sweep(overrides: Sequence[str], config_dir: Path | None = None) -> list[list[str]]:
    """The overrides of each job of a multirun, by Hydra's own parser: a=1,2 · range(22,30,2) · choice(x,y) · glob(*).

    Raises ConfigError.
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
                raise ConfigError(f"multirun: {override.input_line}: name the values: a list, range(…) or choice(…)")
            value = override.value()
            if isinstance(value, Glob):
                values = value.filter(_files(f"{override.key_or_group}/*.yaml", config_dir))
            else:
                values = list(override.sweep_string_iterator())
            if not values:
                raise ConfigError(f"multirun: {override.input_line}: stands for no value")
            axes.append([f"{override.get_key_element()}={text}" for text in values])
    except HydraException as error:
        raise ConfigError(f"multirun: {_first_lines(error)}") from None
    return [list(words) for words in itertools.product(*axes)]


def as_yaml(study: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> str:
    """The composed study file, every key of it, checked. Raises ConfigError."""
    values = load(study, overrides, config_dir).model_dump(mode="json")
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


@contextlib.contextmanager
def _composed(
    study: str, overrides: Sequence[str], config_dir: Path | None
) -> Iterator[tuple[DictConfig, list[tuple[str, Any]]]]:
    """The composition, and where its keys come from: (a file's name or an override, its values), last one first."""
    directories = _search_path(config_dir)
    names = studies(config_dir)
    if study not in names and not any((directory / f"{study}.yaml").is_file() for directory in directories):
        raise ConfigError(f"study {study!r}: no such study file; there are {', '.join(names)}{_nearest(study, names)}")
    for override in overrides:
        _require_key_and_value(override)
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name=PRIMARY, node={"defaults": [study, "_self_"]})
    first, *others = directories
    words = [f"hydra.searchpath=[{','.join(directory.as_uri() for directory in others)}]"] if others else []
    words += [_plain(override, directories, config_dir) for override in overrides]
    try:
        with initialize_config_dir(config_dir=str(first), version_base="1.3", job_name="optuna-search"):
            try:
                composed = compose(config_name=PRIMARY, overrides=words)
            except HydraException as error:
                if "Could not override" not in str(error):
                    raise
                # a group that the study file has no default for is added to it, as `+group=` would
                words = [f"+{word}" if _group_of(word, directories) else word for word in words]
                composed = compose(config_name=PRIMARY, overrides=words)
            loader = GlobalHydra.instance().config_loader()
            used = loader.compute_defaults_list(PRIMARY, words, RunMode.RUN).defaults
        yield composed, [*_overridden(overrides), *_read(used, directories)]
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
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
    """The files that were composed and their values, each in its package."""
    found: list[tuple[str, Any]] = []
    for entry in reversed(used):
        path = next(
            (d / f"{entry.config_path}.yaml" for d in directories if (d / f"{entry.config_path}.yaml").is_file()), None
        )
        if path is None:
            continue
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        group = entry.config_path.rpartition("/")[0]
        if group and "@package _global_" not in text:
            values = {group: values}
        found.append((str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path), values))
    return found


def _source_of(location: Sequence[Any], sources: Sequence[tuple[str, Any]]) -> str:
    """The file that gave the value at this place, or "" for an override and a default."""
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
    """sources: (a file's name, its values) of what was composed, the last one first: a problem then names its file."""
    try:
        return StudyFile.model_validate(values)
    except ValidationError as error:
        problems: dict[str, str] = {}  # a union reports one problem per member: the first says enough
        for problem in error.errors():
            if _where(problem) not in problems:
                file = _source_of(problem["loc"], sources)
                problems[_where(problem)] = f"{file + ': ' if file else ''}{_explain(problem)}"
        raise ConfigError(f"{where}: " + "; ".join(problems.values())) from None


def _search_path(config_dir: Path | None) -> list[Path]:
    mine = config_dir if config_dir is not None else USER_DIR
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such directory")
    directories = [mine.resolve()] if mine.is_dir() else []
    return directories if PACKAGED in directories else [*directories, PACKAGED]


def _files(pattern: str, config_dir: Path | None) -> list[str]:
    found: dict[str, None] = {}
    for directory in _search_path(config_dir):
        for path in sorted(directory.glob(pattern)):
            if not path.name.startswith("_"):
                found.setdefault(path.stem)
    return list(found)


def _require_key_and_value(override: str) -> None:
    if "=" not in override:
        raise ConfigError(f"override {override!r}: must be KEY=VALUE, for instance trials=50")


def _plain(override: str, directories: Sequence[Path], config_dir: Path | None) -> str:
    """Lets any key be set without Hydra's `+`: a wrong one is then refused by name, with the nearest spelling."""
    key, _, value = override.partition("=")
    if key.lstrip("+") == EXPERIMENTS:
        return f"+{EXPERIMENTS}={experiment(value, config_dir)}"
    group = _group_of(override, directories)
    if group and value.replace("-", "").replace("_", "").replace(".", "").isalnum() and value != "null":
        there = _files(f"{group}/*.yaml", config_dir)
        if value not in there:
            raise ConfigError(f"{override}: no such file; there are {', '.join(there)}{_nearest(value, there)}")
    return override if override[0] in "+~" or group else f"++{override}"


def _group_of(override: str, directories: Sequence[Path]) -> str | None:
    group = override.partition("=")[0].partition("@")[0]
    return group if any((directory / group).is_dir() for directory in directories) else None


def experiment(name: str, config_dir: Path | None = None) -> str:
    """The experiment file that `name` means: `02-05_drop-layers-26` is also `drop-layers-26`, `drop_layers_26`, and
    `drop_layers` where no other begins so. Raises ConfigError.
    """
    there = _files(f"{EXPERIMENTS}/*.yaml", config_dir)
    if name in there:
        return name
    wanted = _strategy(name)
    for found in (
        [file for file in there if _strategy(file) == wanted],
        [file for file in there if _strategy(file).startswith(f"{wanted}-")],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"experiments={name}: could be {' or '.join(found)}; say which")
    near = difflib.get_close_matches(wanted, map(_strategy, there), n=1, cutoff=0.5)
    hint = f"; did you mean {next(file for file in there if _strategy(file) == near[0])!r}?" if near else ""
    raise ConfigError(f"experiments={name}: no such file; there are {', '.join(there) or 'none'}{hint}")


def _strategy(name: str) -> str:
    """`02-05_drop_layers-26` → `drop-layers-26`: a file is named MM-DD_strategy."""
    date, _, rest = name.partition("_")
    return (rest if rest and date.replace("-", "").isdigit() else name).replace("_", "-")


def _where(problem: Any) -> str:
    # pydantic puts the members of a union into the location; keys are plain words
    return ".".join(
        str(part) for part in problem["loc"] if str(part).replace("_", "").isalnum() and part not in MEMBERS
    )


def _explain(problem: Any) -> str:
    where = _where(problem)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(where.rpartition('.')[2], _keys_beside(problem['loc']))}"
    message = str(problem["msg"]).removeprefix("Value error, ")
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
