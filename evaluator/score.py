"""PerfNorm, SpeedNorm and Score: pure functions of a measurement and the baseline's.

PerfNorm  = Perf / Perf_base, Perf = 1 / perplexity         1 for the base model
SpeedNorm = 1 − time per token / time per token of the base   0 for the base model
Score     = max(w_perf · PerfNorm + w_speed · SpeedNorm, 0)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from evaluator.errors import NotFinite
from evaluator.measurement import Measurement


@dataclasses.dataclass(frozen=True)
class Formula:
    weight_perf: float = 0.5
    weight_speed: float = 0.5


@dataclasses.dataclass(frozen=True)
class Score:
    """`_se`: standard errors, from the shards of the text and from the turns of the timing."""

    perf_norm: float
    perf_norm_se: float
    speed_norm: float
    speed_norm_se: float
    score: float
    score_se: float


def score_of(measurement: Measurement, baseline: Measurement, formula: Formula = Formula()) -> Score:
    """The score of a measurement.

    PerfNorm's error is paired: that of the mean difference of the shards' NLL, by the delta method; it is far
    smaller than either perplexity's own. Raises NotFinite; ValueError when the two were measured on other text.
    """
    if len(measurement.shard_nll) != len(baseline.shard_nll) or measurement.text_digest != baseline.text_digest:
        raise ValueError(
            f"score: measured on text {measurement.text_digest} ({len(measurement.shard_nll)} shards) and the baseline "
            f"on {baseline.text_digest} ({len(baseline.shard_nll)}): measure both on the same text"
        )
    gain = baseline.nll_nats_per_token - measurement.nll_nats_per_token
    try:
        perf_norm = math.exp(gain)
    except OverflowError:
        perf_norm = math.inf
    differences = [b - m for b, m in zip(baseline.shard_nll, measurement.shard_nll, strict=True)]
    perf_norm_se = perf_norm * standard_error(differences)
    speed_norm = 1.0 - measurement.time_ratio
    score = max(formula.weight_perf * perf_norm + formula.weight_speed * speed_norm, 0.0)
    score_se = math.hypot(formula.weight_perf * perf_norm_se, formula.weight_speed * measurement.time_ratio_se)
    if not all(map(math.isfinite, (perf_norm, perf_norm_se, speed_norm, score, score_se))):
        raise NotFinite(
            f"score: PerfNorm {perf_norm}, SpeedNorm {speed_norm} (NLL {measurement.nll_nats_per_token}, base "
            f"{baseline.nll_nats_per_token}, time ratio {measurement.time_ratio}): the model is broken or was not timed"
        )
    return Score(perf_norm, perf_norm_se, speed_norm, measurement.time_ratio_se, score, score_se)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 where there is but one."""
    n = len(values)
    if n < 2:
        return 0.0
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
