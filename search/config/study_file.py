"""Defines the sections of the study file: every key with its type, its default and the values that are refused.

This module knows no Optuna and builds nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from compressors.choices import PRECISIONS, Choice
from compressors.plan import CHOICES, DIMENSIONS
from evaluator import gpus, tasks
from evaluator.workload import KEYS
from search import secrets
from search.config import references
from search.config.compression import Compression
from search.config.goal import GoalSection
from search.config.section import Section
from search.config.spelling import nearest, require_known


class Range(Section):
    """Range holds the integers from `low` to `high`, both included. It may change when a study is resumed."""

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


def _range_of_text(value: Any) -> Any:
    """Read `9..12` as {low: 9, high: 12}, which needs no quotes in a shell."""
    low, dots, high = value.partition("..") if isinstance(value, str) else ("", "", "")
    return {"low": low, "high": high} if dots else value


def _list_of_one(value: Any) -> Any:
    """Read a value where a list is expected as a list of one."""
    return [value] if isinstance(value, str | int) else value


Dimension = Range | Annotated[int, Field(ge=1)] | None  # searched | fixed | as in the base model


NUMBERS = [name for name, record in CHOICES.items() if record.is_number]
LISTED = {name: record for name, record in CHOICES.items() if not record.is_number}  # choices with names for values


class SpaceSizes(Section):
    """SpaceSizes holds the searched sizes and precisions; `compressors.plan.CHOICES` are added to it."""

    num_hidden_layers: Dimension = None
    num_attention_heads: Dimension = None
    num_key_value_heads: Dimension = None
    hidden_size: Dimension = None
    intermediate_size: Dimension = None
    precision: list[str] | None = None  # None: as in the base model

    @field_validator(*DIMENSIONS, *NUMBERS, mode="before", check_fields=False)
    @classmethod
    def _ranges(cls, value: Any) -> Any:
        return _range_of_text(value)

    @field_validator("precision", *LISTED, mode="before", check_fields=False)
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return _list_of_one(value)

    @field_validator("precision", *LISTED, check_fields=False)
    @classmethod
    def _known(cls, names: list[Any] | None, info: Any) -> list[Any] | None:
        require_known(names, PRECISIONS if info.field_name == "precision" else CHOICES[info.field_name].values)
        if names is not None and (not names or len(set(names)) != len(names)):
            raise ValueError("needs at least one value, and none twice")
        return names


def _searched(record: Choice) -> tuple[Any, Any]:
    """Return the type and the default of a choice in `space`."""
    if record.is_number:
        return Range | Annotated[int, Field(ge=0)], record.default
    return list[type(record.default)], [record.default]  # type: ignore[misc]


if TYPE_CHECKING:

    class Space(SpaceSizes):
        """Space holds what is searched: sizes, precisions and choices."""

        def __getattr__(self, name: str) -> Any: ...

else:
    Space = create_model("Space", __base__=SpaceSizes, **{name: _searched(record) for name, record in CHOICES.items()})


class Model(Section):
    """Model names the base model."""

    source: str  # a local directory, a hub id, or the name of the embedded model
    revision: str | None = None
    num_layers: Annotated[int, Field(ge=1)] | None = None  # expected of the result; `compression` decides


class _PerfPart(tasks.Section):
    """PerfPart holds a part of Perf: 1/perplexity on the search text, or the accuracy of a task."""

    metric: str = "perplexity"

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str) -> str:
        allowed = ("perplexity", *task_names())
        if value not in allowed:
            raise ValueError(f"{value!r} is not one of {', '.join(allowed)}{nearest(value, allowed)}")
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self.task_section()
        return self

    def task_section(self) -> tasks.Section | None:
        """Return the section of this task's kind, or None for the perplexity.

        Raises:
            ValueError: The kind needs a key that is missing.
        """
        if self.metric == "perplexity":
            return None
        section = tasks.module_of(self.metric).Section
        try:
            return section(**{name: getattr(self, name) for name in section.model_fields})
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def task_names() -> list[str]:
    """Return the kinds of task, which are the files of evaluator/tasks."""
    return tasks.names()


def _keys_of_tasks() -> dict[str, Any]:
    """Return the keys of all kinds of task, as pydantic's create_model takes them."""
    sections = [tasks.module_of(name).Section for name in task_names()]
    fields = {name: field for section in sections for name, field in section.model_fields.items()}
    return {name: (field.annotation, field) for name, field in fields.items() if name not in tasks.Section.model_fields}


if TYPE_CHECKING:
    PerfPart = _PerfPart
else:
    PerfPart = create_model(
        "PerfPart", __base__=_PerfPart, __doc__=_PerfPart.__doc__, __module__=__name__, **_keys_of_tasks()
    )


EMBEDDED, SELF = "embedded", "self"  # the text that CPython ships; text that the base model writes
Weights = Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]  # how much each text counts
Texts = list[str] | Weights | Literal["embedded"]


class Text(Section):
    """Text names the texts: `embedded` (prose that CPython ships), .txt and .jsonl files, hub:ORGANISATION/NAME.

    The calibration text can also be `self`, which the base model writes, and a list of all of these. A mapping gives
    each text a weight; texts of a list weigh the same.
    """

    calibration: list[str] | Weights | Literal["embedded", "self"] = [EMBEDDED, SELF]
    search: Texts = "embedded"
    report: Texts | None = "embedded"  # text that no search saw, for confirmation; null: none
    window: Annotated[int, Field(ge=16)] = 256  # tokens
    calibration_windows: Annotated[int, Field(ge=1)] = 16
    moments_windows: Annotated[int, Field(ge=1)] = 32  # for each domain, where `build.needs_moments`
    shards: Annotated[int, Field(ge=2)] = 16
    windows_per_shard: Annotated[int, Field(ge=1)] = 1
    prompts: str | None = None  # a file of requests that a workload of kind batch or serve times; null: random ids
    chat_template_kwargs: dict[str, Any] = {}  # arguments of the chat template for those of them that are chats

    @field_validator("calibration", "search", "report", mode="before")
    @classmethod
    def _lists(cls, value: Any, info: ValidationInfo) -> Any:
        alone = value == EMBEDDED or (value == SELF and info.field_name == "calibration")
        return value if alone else _list_of_one(value)

    @property
    def calibration_names(self) -> list[str]:
        """The parts of the calibration text."""
        return [self.calibration] if isinstance(self.calibration, str) else list(self.calibration)

    @property
    def writes_beside(self) -> bool:
        """Whether the base model writes a part of the calibration text, beside others."""
        return SELF in self.calibration_names and set(self.calibration_names) != {SELF}

    @field_validator("search", "report")
    @classmethod
    def _judges(cls, value: Any) -> Any:
        named = [value] if isinstance(value, str) else value or []
        if SELF in named or (EMBEDDED in named and not isinstance(value, str)):
            raise ValueError(f"{SELF} and mixes with {EMBEDDED} are of text.calibration alone; name files")
        return value


def _lengths_of_text(value: Any) -> Any:
    """Read `64..256` as [64, 256], and one number as both ends."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value, value]
    low, dots, high = value.partition("..") if isinstance(value, str) else ("", "", "")
    return [low, high] if dots else value


def _rising(value: list[int]) -> list[int]:
    if value[0] > value[1]:
        raise ValueError(f"{value[0]}..{value[1]} must not fall")
    return value


Lengths = Annotated[  # the least and the most tokens
    list[Annotated[int, Field(ge=1)]],
    Field(min_length=2, max_length=2),
    BeforeValidator(_lengths_of_text),
    AfterValidator(_rising),
]


class WorkloadSection(Section):
    """WorkloadSection holds what is timed: decode steps, whole requests, or a server; see `evaluator.speed`."""

    kind: Literal["decode", "batch", "serve"] = "decode"
    batch_sizes: list[Annotated[int, Field(ge=1)]] = [1]
    prompt_tokens: Annotated[int, Field(ge=1)] = 64
    decode_steps: Annotated[int, Field(ge=4)] = 16
    turns: Annotated[int, Field(ge=4)] = 12
    seed: int = 0
    requests: Annotated[int, Field(ge=1)] = 64
    input_tokens: Lengths = [64, 256]
    output_tokens: Lengths = [64, 128]
    ignore_eos: bool = True
    max_num_seqs: Annotated[int, Field(ge=1)] = 256
    concurrencies: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1, 8, 64]
    request_rate: Annotated[float, Field(gt=0)] | None = None
    goodput: dict[Literal["ttft_ms", "tpot_ms", "e2el_ms"], Annotated[float, Field(gt=0)]] = {}
    server: dict[str, Any] = {}  # arguments of `vllm serve`, by their names in Python

    @field_validator("batch_sizes", "concurrencies", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return _list_of_one(value)

    @property
    def of_kind(self) -> dict[str, Any]:
        """The keys that a time of this kind depends on; `kind` only where it is not decode, which is older."""
        return {name: getattr(self, name) for name in KEYS[self.kind]}


class Evaluation(Section):
    """Evaluation holds how models are measured: engine, timing and the parts of Perf."""

    backend: str = "auto"
    device: str = "auto"
    speed: Literal["measured", "predicted"] = "measured"
    workload: WorkloadSection = WorkloadSection()
    # the standard error of the Score that is small enough to end a trial's timing; 0: take all turns
    score_se: Annotated[float, Field(ge=0)] = 0.003
    # whether `run` makes the tables of `forecast` first; auto: for the sampler that needs them. It uses what is there.
    forecast: bool | Literal["auto"] = "auto"
    compile: bool = False  # torch.compile inside vLLM: slower to start, closer to the server's defaults
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.3
    start_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    call_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    kl_max_mb: Annotated[float, Field(ge=0)] = 1024.0  # for the base model's log-probabilities, kept to compute KL
    perf: Annotated[list[PerfPart], Field(min_length=1)] = [PerfPart()]
    # the difference of an answer's length from the base model's that makes none, as a share, beyond its standard error
    length_tolerance: Annotated[float, Field(ge=0)] = 0.1

    @field_validator("perf", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value


class ScoreSection(Section):
    """ScoreSection holds the weights of the Score, and what longer answers of a model do to it."""

    weight_perf: Annotated[float, Field(ge=0)] = 0.5
    weight_speed: Annotated[float, Field(ge=0)] = 0.5
    length: Literal["ignore", "flag", "penalise"] = "flag"

    @property
    def weights(self) -> dict[str, float]:
        """The weights of PerfNorm and SpeedNorm alone, by their keys."""
        return {"weight_perf": self.weight_perf, "weight_speed": self.weight_speed}


class Sampler(Section):
    """Sampler holds the settings of the study's sampler."""

    name: Literal["tpe", "gp", "forecast", "random"] = "tpe"
    n_startup_trials: Annotated[int, Field(ge=1)] = 10


class Pruner(Section):
    """Pruner holds the settings of the study's pruner."""

    name: Literal["wilcoxon", "median", "hyperband", "none"] = "wilcoxon"
    p_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.1
    n_startup_steps: Annotated[int, Field(ge=0)] = 4  # shards before a trial may be pruned
    n_startup_trials: Annotated[int, Field(ge=0)] = 4  # median only
    reduction_factor: Annotated[int, Field(ge=2)] = 3  # hyperband only


class DistillationSection(Section):
    """DistillationSection holds how models are distilled; see `compressors.distillation.settings.Distillation`."""

    tokens: Annotated[int, Field(ge=1)] = 2_000_000
    batch_tokens: Annotated[int, Field(ge=1)] = 32_768
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    temperature: Annotated[float, Field(gt=0)] = 1.0
    weight_ce: Annotated[float, Field(ge=0)] = 0.0
    evaluate_every: Annotated[int, Field(ge=1)] = 524_288
    patience: Annotated[int, Field(ge=1)] = 4
    seed: int = 0


def _seconds(value: Any) -> Any:
    """Return the seconds of a length of time such as 90, 45s, 30m, 2h or 1h30m."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", value.replace(" ", ""))
    if found is None or not any(found.groups()):
        raise ValueError(f"{value!r} is no length of time; write it as 90, 45s, 30m, 2h or 1h30m")
    hours, minutes, seconds = (int(number or 0) for number in found.groups())
    return 3600 * hours + 60 * minutes + seconds


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]  # a length of time, which may be written as 2h


class Limits(Section):
    """Limits holds the limits on models, trials and disk space."""

    max_size_mb: Annotated[float, Field(gt=0)] | None = None  # the size of model.safetensors, 1 MB = 1e6 bytes
    max_consecutive_failures: Annotated[int, Field(ge=1)] = 5
    time: Seconds | None = None  # after which `run` begins no trial; what runs is finished
    patience: Annotated[int, Field(ge=1)] | None = None  # finished trials without a better one that end the study
    max_zip_mb: Annotated[float, Field(gt=0)] | None = None  # the size of submit.zip
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2  # the number of best trials whose checkpoints stay on disk


class Confirm(Section):
    """Confirm holds how a study confirms its best trials; see `search.confirm`."""

    top: Annotated[int, Field(ge=0)] = 3  # trials; 0: `run` confirms none
    pairs: Annotated[int, Field(ge=1)] = 3  # pairs of fresh engine processes for each
    server: dict[str, Any] | None = None  # arguments of the engine's server, by their own names


class Export(Section):
    """Export names the reader of exported models."""

    for_transformers: str | None = None  # the version that reads what export and compress write; null: this one
    target_gpu: str | None = None  # the GPU that serves it, by its name in evaluator.gpus; null: the one at hand

    @field_validator("target_gpu")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        names = {name.replace(" ", "").lower(): name for name in gpus.CAPABILITIES}
        if value is None:
            return None
        known = names.get(value.replace(" ", "").lower())
        if known is None:
            raise ValueError(f"{value!r} is not one of {', '.join(gpus.CAPABILITIES)}; leave it out for another GPU")
        return known


class Tracking(Section):
    """Tracking holds how a study is tracked in MLflow."""

    mlflow: bool = True
    experiment: str = "optuna-search"


class StudyFile(Section):
    """StudyFile holds a study file: one field for each key or section."""

    study_name: Annotated[str, Field(pattern=r"^[^'\"`]+$")]
    experiment_name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None  # the name of what is compressed by hand
    description: str | None = None
    trials: Annotated[int, Field(ge=1)] = 20
    seed: Annotated[int, Field(ge=0)] = 0
    storage: str = "sqlite:///outputs/studies.db"
    storage_patience: Annotated[float, Field(ge=1)] = 60.0  # seconds
    outputs: Path = Path("outputs")
    model: Model
    compression: Compression = Compression()
    space: Space = Space()
    text: Text = Text()
    evaluation: Evaluation = Evaluation()
    score: ScoreSection = ScoreSection()
    goal: GoalSection = GoalSection()
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
    limits: Limits = Limits()
    confirm: Confirm = Confirm()
    export: Export = Export()
    distillation: DistillationSection = DistillationSection()
    tracking: Tracking = Tracking()

    _references: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)

    def refer(self, known: dict[tuple[str | int, ...], str]) -> None:
        """Note which values refer to the environment, and how they are written."""
        self._references = known

    def stored(self) -> dict[str, Any]:
        """Return the values as JSON for what is kept: without the storage, with `${oc.env:NAME}` as it is written."""
        return {key: value for key, value in self.shown().items() if key != "storage"}

    def shown(self) -> dict[str, Any]:
        """Return the values as JSON without secrets, with `${oc.env:NAME}` as it is written."""
        values: dict[str, Any] = references.put_back(self.model_dump(mode="json"), self._references)
        if ("storage",) not in self._references:
            values["storage"] = secrets.masked_url(self.storage)
        return values

    @property
    def source_shown(self) -> str:
        """Return `model.source` without secrets, with `${oc.env:NAME}` as it is written."""
        return self._references.get(("model", "source")) or secrets.masked_places(self.model.source)

    @property
    def description_shown(self) -> str | None:
        """Return the description without secrets, with `${oc.env:NAME}` as it is written."""
        if self.description is None:
            return None
        return self._references.get(("description",)) or secrets.masked_places(self.description)

    def to_line(self) -> str:
        """Return the study file as a line of JSON for another process of this program; it holds what is secret."""
        known = [[list(location), text] for location, text in self._references.items()]
        return json.dumps({"file": self.model_dump(mode="json"), "references": known})

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Return the study file that `to_line` wrote."""
        values = json.loads(line)
        file = cls.model_validate(values["file"])
        file.refer({tuple(location): text for location, text in values["references"]})
        secrets.remember_url(file.storage)
        return file

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if self.score.weight_perf + self.score.weight_speed <= 0:
            raise ValueError("score: weight_perf and weight_speed are both 0, so that every trial would score 0")
        return self

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        plain = self.goal.objective == "score" and not self.goal.bounds
        if not plain and self.pruner.name not in ("wilcoxon", "none"):
            raise ValueError(
                f"pruner: {self.pruner.name} compares a trial with all others, also with those that miss the goal's "
                "bounds; choose wilcoxon or none"
            )
        return self

    @model_validator(mode="after")
    def _readable(self) -> Self:
        version = self.export.for_transformers
        if version is not None and "8-bit" in (*self.space.lm_head, self.compression.lm_head):
            from compressors.errors import CheckpointError
            from compressors.model import transformers_version  # imports torch: only where it is needed

            try:
                old = transformers_version.in_old_form(version)
            except CheckpointError:  # export reports it
                old = False
            if old:
                raise ValueError(
                    f"lm_head: 8-bit with export.for_transformers: {version}: {transformers_version.NO_LM_HEAD}; "
                    "choose 16-bit, or export.for_transformers=null where the server has a newer vLLM"
                )
        return self
