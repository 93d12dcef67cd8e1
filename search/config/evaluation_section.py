"""Defines `evaluation`, the section of the study file that says how models are measured and judged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from evaluator import tasks
from evaluator.workload import KEYS
from search.config.section import Section, list_of_one
from search.config.spelling import nearest


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
        return list_of_one(value)

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

    @property
    def is_timed(self) -> bool:
        """Whether times are measured, and not predicted from bytes and layers."""
        return self.speed == "measured"

    @field_validator("perf", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value
