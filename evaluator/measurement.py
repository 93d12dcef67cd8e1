"""Measurement: the raw facts about one checkpoint on one machine. Knows no preference and no formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

METHOD = 1  # raised whenever the same model would be measured otherwise: older numbers can't be compared with it


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is timed: `turns` turns per engine of `decode_steps` single decode steps after a prompt of random ids.

    batch_sizes: sequences decoded together; over several the time per token is the mean.
    prompt_tokens: per sequence; its prefill is not timed.
    """

    batch_sizes: tuple[int, ...] = (1,)
    prompt_tokens: int = 64
    decode_steps: int = 16
    turns: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_sizes", tuple(self.batch_sizes))
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"workload: batch_sizes are positive integers, not {self.batch_sizes}")
        for name, least in (("prompt_tokens", 1), ("decode_steps", 1), ("turns", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"workload: {name} is {getattr(self, name)}; {least} is the least")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds per token of a candidate and of the baseline, and their ratio; `_se`: standard errors.

    samples: decode steps of the candidate that went in; 0: nothing was timed.
    """

    time_per_token_ms: float
    time_per_token_ms_se: float
    base_time_per_token_ms: float
    base_time_per_token_ms_se: float
    time_ratio: float
    time_ratio_se: float
    samples: int


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Accuracy on a task.

    value: mean of correct, 0 to 1; se: its standard error. correct: of each item, 0 to 1, in the task's order, so that
    two models' errors can be paired. digest: of the items as the model read them.
    """

    value: float
    se: float
    items: int
    correct: tuple[float, ...]
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One checkpoint, measured. Units are in the names; MB = 1e6 bytes.

    shard_nll: mean nats per token of each shard, in the order of the shards; nll_nats_per_token is over all tokens.
    time_ratio: time per token over the baseline's, timed in turn with it. The baseline's own is 1.
    kl_nats_per_token, top1_agreement: against the base model, where they were computed.
    logits_sha256: of the raw logits (vLLM: log-probabilities) on the first window, as the backend computes them.
    seconds: by stage. notes: for instance which kernel an engine chose.
    tasks: by name, those that were asked for.
    """

    perplexity: float
    nll_nats_per_token: float
    nll_nats_per_token_se: float
    tokens: int
    shard_nll: tuple[float, ...]
    time_per_token_ms: float
    time_per_token_ms_se: float
    base_time_per_token_ms: float
    base_time_per_token_ms_se: float
    time_ratio: float
    time_ratio_se: float
    timing_samples: int
    tokens_per_sec: float
    model_size_mb: float
    total_parameters: int
    number_of_layers: int
    number_of_heads: int
    hidden_dim: int
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
    kl_nats_per_token: float | None = None
    top1_agreement: float | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tasks: dict[str, TaskResult] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        values["shard_nll"] = list(self.shard_nll)
        values["notes"] = list(self.notes)
        for result in values["tasks"].values():
            result["correct"] = list(result["correct"])
        values["workload"]["batch_sizes"] = list(self.workload.batch_sizes)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """Raises TypeError for an unknown or missing name."""
        found = dict(values)
        found["shard_nll"] = tuple(found["shard_nll"])
        found["notes"] = tuple(found.get("notes", ()))
        found["workload"] = Workload(**found["workload"])
        found["tasks"] = {
            name: TaskResult(**{**result, "correct": tuple(result["correct"])})
            for name, result in found.get("tasks", {}).items()
        }
        return cls(**found)
