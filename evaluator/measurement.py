"""Measurement holds the raw facts about one checkpoint on one machine, without any preference or formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from evaluator.answering import Asked
from evaluator.gpu_state import GpuRecord
from evaluator.metrics import COUNT, METRIC, Metric, Shown
from evaluator.served import Served
from evaluator.served import from_dict as served_of

VERSION = 1  # raised when the same model would give other numbers, which cannot be compared with older ones


KEYS = {  # of a workload, by its kind
    "decode": ("batch_sizes", "prompt_tokens", "decode_steps", "turns", "seed"),
    "batch": (
        *("kind", "requests", "input_tokens", "output_tokens", "ignore_eos", "max_num_seqs"),
        *("turns", "seed"),
    ),
    "serve": (
        *("kind", "concurrencies", "request_rate", "requests", "input_tokens", "output_tokens", "ignore_eos"),
        *("goodput", "server", "turns", "seed"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is timed, of each engine in turn.

    Of kind decode, single decode steps are timed, after a prompt of random ids. Of kind batch, whole requests are
    timed, which are given at once: the time per token is the time until the last answer is complete, prefill included,
    over the number of generated tokens; see `evaluator.batch`. Of kind serve, the same is timed of requests to a
    server, by `vllm bench serve`; see `evaluator.served`.

    Attributes:
        batch_sizes: decode: the numbers of sequences decoded together; the time per token is the mean over them.
        prompt_tokens: decode: the length of each sequence's prompt; its prefill is not timed.
        decode_steps: decode: the number of single decode steps in a turn.
        turns: The number of turns of each engine.
        seed: The random seed of the prompts, and of lengths that are drawn.
        kind: "decode", "batch" or "serve".
        requests: batch, serve: the number of requests.
        input_tokens: batch, serve: the least and the most tokens of a prompt of random ids.
        output_tokens: batch, serve: the least and the most tokens of an answer whose length is drawn.
        ignore_eos: batch, serve: whether answers have the lengths that are drawn; else they end by themselves, after
            the most tokens at the latest.
        max_num_seqs: batch: the most requests that run at once.
        concurrencies: serve: the numbers of requests that run at once; the time per token is the mean over them.
        request_rate: serve: the requests that come in a second, in place of the concurrencies; None: they decide.
        goodput: serve: the most milliseconds of a request that counts as good, by name; see `evaluator.served.LIMITS`.
        server: serve: arguments of `vllm serve`.
        asked: batch, and serve where prompts come from a file: the requests themselves, which are not kept.
        texts: serve: the same prompts as texts, which are not kept either.

    Raises:
        ValueError: A number is too small, or a kind is unknown.
    """

    batch_sizes: tuple[int, ...] = (1,)
    prompt_tokens: int = 64
    decode_steps: int = 16
    turns: int = 12
    seed: int = 0
    kind: str = "decode"
    requests: int = 64
    input_tokens: tuple[int, int] = (64, 256)
    output_tokens: tuple[int, int] = (64, 128)
    ignore_eos: bool = True
    max_num_seqs: int = 256
    concurrencies: tuple[int, ...] = (1, 8, 64)
    request_rate: float | None = None
    goodput: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    server: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    asked: tuple[Asked, ...] = dataclasses.field(default=(), compare=False, repr=False)
    texts: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "input_tokens", "output_tokens", "concurrencies"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in KEYS:
            raise ValueError(f"workload: kind is {self.kind!r}; there are {', '.join(KEYS)}")
        for name in ("batch_sizes", "concurrencies"):
            sizes = getattr(self, name)
            if not sizes or min(sizes) < 1:
                raise ValueError(f"workload: {name} are positive integers, not {sizes}")
        if self.request_rate is not None and self.request_rate <= 0:
            raise ValueError(f"workload: request_rate is {self.request_rate:g}; it has to be more than 0")
        for name, least in (
            *(("prompt_tokens", 1), ("decode_steps", 1), ("turns", 2)),
            *(("requests", 1), ("max_num_seqs", 1)),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"workload: {name} is {getattr(self, name)}; {least} is the least")
        for name in ("input_tokens", "output_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"workload: {name} is {low} to {high}; it has to begin at 1 or more and not to fall")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of sequences that run at once, each of which is timed by itself."""
        if self.kind == "serve":
            return self.concurrencies if self.request_rate is None else (1,)
        return self.batch_sizes if self.kind == "decode" else (min(self.requests, self.max_num_seqs),)

    def to_dict(self) -> dict[str, Any]:
        """Return what a time of this kind depends on, as JSON values; decode, the older kind, is not named."""
        values = {name: getattr(self, name) for name in KEYS[self.kind]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Workload:
        """Return the workload that `to_dict` wrote, without its requests.

        Raises:
            TypeError: A name is unknown.
        """
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Timing:
    """The milliseconds per token of a candidate and of the baseline, and their ratio.

    Attributes:
        time_per_token_ms: The candidate's time.
        time_per_token_ms_se: Its standard error.
        base_time_per_token_ms: The baseline's time.
        base_time_per_token_ms_se: Its standard error.
        time_ratio: The candidate's time over the baseline's.
        time_ratio_se: Its standard error.
        samples: The number of the candidate's decode steps, or runs of all requests; 0: nothing was timed.
    """

    time_per_token_ms: float
    time_per_token_ms_se: float
    base_time_per_token_ms: float
    base_time_per_token_ms_se: float
    time_ratio: float
    time_ratio_se: float
    samples: int


@dataclasses.dataclass(frozen=True)
class ShownAnswer:
    """An answer that a report can show: the question, what was expected, and what the model wrote."""

    question: str
    expected: str
    text: str


@dataclasses.dataclass(frozen=True)
class Answers:
    """What is kept of generated answers; `evaluator.lengths` says what each share counts.

    Attributes:
        tokens: The number of generated tokens of each answer, in the task's order.
        cut: The share of answers that reached the limit of tokens.
        empty: The share without any text.
        repeating: The share that ends in an endless cycle.
        shown: The first answers.
    """

    tokens: tuple[int, ...]
    cut: float
    empty: float
    repeating: float
    shown: tuple[ShownAnswer, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Answers:
        """Return the answers in JSON values."""
        shown = tuple(ShownAnswer(**one) for one in values["shown"])
        return cls(**{**values, "tokens": tuple(values["tokens"]), "shown": shown})


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The accuracy on a task.

    Attributes:
        value: The mean of `correct`, from 0 to 1.
        se: Its standard error.
        items: The number of items.
        correct: How correct each item was, from 0 to 1, in the task's order: two models' errors can be paired.
        digest: The digest of the items as the model read them.
        answers: The generated answers; None where the task lets a model generate nothing.
    """

    value: float
    se: float
    items: int
    correct: tuple[float, ...]
    digest: str = ""
    answers: Answers | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `answers` only where there are any."""
        values = {**dataclasses.asdict(self), "correct": list(self.correct)}
        if self.answers is None:
            del values["answers"]
        else:
            values["answers"] = {**values["answers"], "tokens": list(self.answers.tokens)}
            values["answers"]["shown"] = list(values["answers"]["shown"])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskResult:
        """Return the result that `to_dict` wrote."""
        answers = None if values.get("answers") is None else Answers.from_dict(values["answers"])
        return cls(**{**values, "correct": tuple(values["correct"]), "answers": answers})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One checkpoint, measured.

    Units are in the names; a megabyte is 1e6 bytes. Names that end with `_se` are standard errors. A field with a
    `Metric` is one of `METRICS`.

    Attributes:
        perplexity: The perplexity on the text.
        kl_nats_per_token: The KL divergence of the base model to this one, where it was computed.
        top1_agreement: The share of positions where both put the same token first, where it was computed.
        nll_nats_per_token: The mean negative log-likelihood over all tokens.
        tokens: The number of tokens that were predicted.
        shard_nll: The mean negative log-likelihood of each shard, in the order of the shards.
        time_per_token_ms: The time of a decode step, or of all requests, for each generated token.
        base_time_per_token_ms: The same of the baseline, timed in turn with it.
        time_ratio: The time per token over the baseline's; the baseline's own is 1.
        timing_samples: The number of decode steps, or of runs of all requests, that were timed.
        tokens_per_sec: 1000 / time_per_token_ms.
        model_size_mb: The size of the weight files.
        total_parameters: The parameters of the dequantized model.
        workload: What was timed.
        text_digest: The digest of the text as the model read it.
        logits_sha256: The sha256 of the raw logits (vLLM: log-probabilities) on the first window.
        weights_sha256: The sha256 of the weight files.
        seconds: How long each stage took.
        notes: Remarks, such as which kernel an engine chose.
        tasks: The results of the tasks that were asked, by name.
        gpu: The GPU's clock, throttling and foreign processes during the timing; None where they are not known.
        tokens_per_answer: The mean number of generated tokens of an answer, over all tasks that let the model generate;
            None where none does, as for the next two.
        length_ratio: The same over the base model's on the same prompts; the base model's own is 1.
        served: What the server did under each load of a workload of kind serve.
        seconds_per_answer: tokens_per_answer times the time per token; None also where nothing was timed.
    """

    perplexity: float = dataclasses.field(
        metadata={
            METRIC: Metric(
                better="lower",
                attribute=True,
                status=True,
                mlflow="metric",
                column=Shown("perplexity", 20, ",.3f"),
                front=Shown("perplexity", 20, ".3f"),
                row=Shown("perplexity", 30, ",.4f"),
                note=Shown("perplexity", 10, ".3f"),
            )
        }
    )
    kl_nats_per_token: float | None = dataclasses.field(
        default=None,
        metadata={
            METRIC: Metric(
                unit="nats per token",
                better="lower",
                base=0.0,
                attribute=True,
                status=True,
                column=Shown("KL", 30, ".4f"),
                row=Shown("KL to the base, nats per token", 60, ".5f"),
                note=Shown("KL to the base", 50, ".4f"),
            )
        },
    )
    top1_agreement: float | None = dataclasses.field(
        default=None,
        metadata={
            METRIC: Metric(
                better="higher",
                base=1.0,
                attribute=True,
                row=Shown("top-1 agreement with the base", 70, ".4f"),
            )
        },
    )
    nll_nats_per_token: float
    nll_nats_per_token_se: float
    tokens: int
    shard_nll: tuple[float, ...]
    time_per_token_ms: float = dataclasses.field(
        metadata={
            METRIC: Metric(
                unit="ms",
                timed=True,
                better="lower",
                attribute=True,
                status=True,
                mlflow="metric",
                column=Shown("ms/token", 40, ".3f"),
                row=Shown("time_per_token_ms", 40, ".4f", with_error=True),
                note=Shown("time per token", 20, ".3f"),
            )
        }
    )
    time_per_token_ms_se: float
    base_time_per_token_ms: float
    base_time_per_token_ms_se: float
    time_ratio: float
    time_ratio_se: float
    timing_samples: int
    tokens_per_sec: float = dataclasses.field(
        metadata={
            METRIC: Metric(
                unit="tokens/s",
                timed=True,
                better="higher",
                attribute=True,
                mlflow="metric",
                row=Shown("tokens_per_sec", 50, ",.1f"),
            )
        }
    )
    model_size_mb: float = dataclasses.field(
        metadata={
            METRIC: Metric(
                unit="MB",
                better="lower",
                attribute=True,
                status=True,
                mlflow="parameter",
                column=Shown("MB", 60, ".1f"),
                front=Shown("MB", 60, ".1f"),
                row=Shown("model_size_mb", 20, ".1f"),
                note=Shown("size", 30, ".1f"),
            )
        }
    )
    total_parameters: int = dataclasses.field(
        metadata={
            METRIC: Metric(
                attribute=True,
                status=True,
                mlflow="parameter",
                column=Shown("params", 10, COUNT),
                row=Shown("parameters", 10, COUNT),
                note=Shown("parameters", 40, ","),
            )
        }
    )
    number_of_layers: int = dataclasses.field(metadata={METRIC: Metric(mlflow="parameter")})
    number_of_heads: int = dataclasses.field(metadata={METRIC: Metric(mlflow="parameter")})
    hidden_dim: int = dataclasses.field(metadata={METRIC: Metric(mlflow="parameter")})
    backend: str
    engine_version: str
    transformers_version: str
    torch_version: str
    device: str
    dtype: str
    workload: Workload
    text_digest: str
    logits_sha256: str
    weights_sha256: str
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tasks: dict[str, TaskResult] = dataclasses.field(default_factory=dict)
    gpu: GpuRecord | None = None
    tokens_per_answer: float | None = dataclasses.field(
        default=None,
        metadata={
            METRIC: Metric(
                optional=True,
                attribute=True,
                status=True,
                mlflow="metric",
                row=Shown("tokens per answer", 42, ",.1f"),
                note=Shown("tokens per answer", 22, ",.1f"),
            )
        },
    )
    length_ratio: float | None = dataclasses.field(
        default=None,
        metadata={
            METRIC: Metric(
                base=1.0,
                optional=True,
                attribute=True,
                status=True,
                mlflow="metric",
                column=Shown("length", 42, ".2f"),
                front=Shown("length", 70, ".2f"),
                row=Shown("length of answers, over the baseline's", 43, ".3f", with_error=True),
                note=Shown("length of answers, over the baseline's", 23, ".3f", with_error=True),
            )
        },
    )
    length_ratio_se: float | None = None
    served: tuple[Served, ...] = ()
    seconds_per_answer: float | None = dataclasses.field(
        default=None,
        metadata={
            METRIC: Metric(
                unit="s",
                timed=True,
                better="lower",
                optional=True,
                attribute=True,
                status=True,
                mlflow="metric",
                column=Shown("s/answer", 41, ".3f"),
                row=Shown("seconds_per_answer", 41, ".4f"),
                note=Shown("time per answer", 21, ".3f"),
            )
        },
    )

    @property
    def timed(self) -> bool:
        """Whether the times were measured; if not, they are relative to the baseline's 1."""
        return self.timing_samples > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON values."""
        values = dataclasses.asdict(self)
        values["shard_nll"] = list(self.shard_nll)
        values["notes"] = list(self.notes)
        values["tasks"] = {name: result.to_dict() for name, result in self.tasks.items()}
        for name in (*OF_ANSWERS, "length_ratio_se"):
            if values[name] is None:
                del values[name]
        if self.served:
            values["served"] = list(values["served"])
        else:
            del values["served"]
        values["workload"] = self.workload.to_dict()
        if self.gpu is None:
            del values["gpu"]
        else:
            values["gpu"] = self.gpu.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """Return the measurement that `to_dict` wrote.

        Raises:
            TypeError: A name is unknown or missing.
        """
        found = dict(values)
        found["shard_nll"] = tuple(found["shard_nll"])
        found["notes"] = tuple(found.get("notes", ()))
        found["workload"] = Workload.from_dict(found["workload"])
        found["tasks"] = {name: TaskResult.from_dict(result) for name, result in found.get("tasks", {}).items()}
        found["served"] = tuple(map(served_of, found.get("served", ())))
        found["gpu"] = None if found.get("gpu") is None else GpuRecord.from_dict(found["gpu"])
        return cls(**found)


METRICS: Mapping[str, Metric] = {  # by field, in the order of a trial's attributes
    field.name: field.metadata[METRIC] for field in dataclasses.fields(Measurement) if METRIC in field.metadata
}
OF_ANSWERS = tuple(name for name, metric in METRICS.items() if metric.optional)  # None where nothing was generated
