"""A whole measurement for tests, which name only what they look at."""

import dataclasses
import math
from typing import Any

from evaluator.measurement import Measurement
from evaluator.workload import Workload

NLL, MS = 2.0, 4.0
WHOLE: dict[str, Any] = {
    "perplexity": math.exp(NLL),
    "nll_nats_per_token": NLL,
    "nll_nats_per_token_se": 0.1,
    "tokens": 400,
    "shard_nll": (NLL, NLL),
    "time_per_token_ms": MS,
    "time_per_token_ms_se": 0.1,
    "base_time_per_token_ms": MS,
    "base_time_per_token_ms_se": 0.1,
    "time_ratio": 1.0,
    "time_ratio_se": 0.01,
    "timing_samples": 12,
    "tokens_per_sec": 1e3 / MS,
    "model_size_mb": 0.5,
    "total_parameters": 400_000,
    "number_of_layers": 4,
    "number_of_heads": 6,
    "hidden_dim": 96,
    "backend": "transformers",
    "engine_version": "transformers 5",
    "transformers_version": "5",
    "torch_version": "2",
    "device": "cpu",
    "dtype": "float32",
    "workload": Workload(),
    "text_digest": "text",
    "logits_sha256": "logits",
    "weights_sha256": "weights",
}


def measurement(**changes: Any) -> Measurement:
    """Return a measurement of a base model with some fields changed."""
    return dataclasses.replace(Measurement(**WHOLE), **changes)
