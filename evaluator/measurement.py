"""Measurement holds the raw facts about one checkpoint on one machine, without any preference or formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from evaluator.gpu_state import GpuRecord
from evaluator.metrics import COUNT, METRIC, Metric, Shown
from evaluator.served import Served
from evaluator.served import from_dict as served_of
from evaluator.task_result import TaskResult
from evaluator.workload import Workload

VERSION = 1  # raised when the same model would give other numbers, which cannot be compared with older ones


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
