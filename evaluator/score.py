"""Pure functions that give PerfNorm, SpeedNorm and Score from a measurement and the baseline's.

PerfNorm  = Σ wᵢ · Perfᵢ / Perfᵢ_base / Σ wᵢ                  1 for the base model
            Perf is 1 / perplexity of the text, or the accuracy on a task
SpeedNorm = 1 − time per token / time per token of the base   0 for the base model
Score     = max(w_perf · PerfNorm + w_speed · SpeedNorm, 0)

Where longer answers are to count against a model, its time per token is multiplied by the ratio of generated tokens, if
that is above 1: shorter answers earn nothing, or an empty answer would be the fastest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from evaluator.errors import NotFinite
from evaluator.measurement import Measurement
from evaluator.task_result import TaskResult

PERPLEXITY = "perplexity"  # the part of Perf that is not a task
NO_BETTER = 2.0  # standard errors by which a task may flatter a compressed model


@dataclasses.dataclass(frozen=True)
class Formula:
    """The weights of a score.

    Attributes:
        weight_perf: The weight of PerfNorm.
        weight_speed: The weight of SpeedNorm.
        perf: The parts of Perf with their weights: "perplexity", or the name of a task of the measurement.
        penalise_length: Whether longer answers make a model slower, see `length_factor`.

    Raises:
        ValueError: The weights of the parts are not positive, or a name comes twice.
    """

    weight_perf: float = 0.5
    weight_speed: float = 0.5
    perf: tuple[tuple[str, float], ...] = ((PERPLEXITY, 1.0),)
    penalise_length: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "perf", tuple((str(name), float(weight)) for name, weight in self.perf))
        weights = [weight for _, weight in self.perf]
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
            raise ValueError(
                f"score: the weights of perf are {weights}; take numbers of 0 or more, one of them above 0"
            )
        if len({name for name, _ in self.perf}) < len(self.perf):
            raise ValueError(f"score: perf names {', '.join(name for name, _ in self.perf)}; name each once")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `penalise_length` only where it holds."""
        values = dataclasses.asdict(self)
        return values if self.penalise_length else {k: v for k, v in values.items() if k != "penalise_length"}


@dataclasses.dataclass(frozen=True)
class Score:
    """A score and its parts, each with its standard error (`_se`).

    The errors come from the shards of the text and from the turns of the timing.
    """

    perf_norm: float
    perf_norm_se: float
    speed_norm: float
    speed_norm_se: float
    score: float
    score_se: float


def score_of(measurement: Measurement, baseline: Measurement, formula: Formula = Formula()) -> Score:
    """Return the score of a measurement.

    PerfNorm's error is that of its parts, see `perf_ratio`, which are taken as independent.

    Raises:
        NotFinite: A part is NaN or infinite.
        ValueError: The two were not measured on the same text and tasks.
    """
    total = math.fsum(weight for _, weight in formula.perf)
    parts = [(weight, *perf_ratio(name, measurement, baseline)) for name, weight in formula.perf]
    perf_norm = math.fsum(weight * ratio for weight, ratio, _ in parts) / total
    perf_norm_se = math.hypot(*(weight * error for weight, _, error in parts)) / total
    time_ratio, time_ratio_se = time_ratio_of(measurement, formula)
    speed_norm = 1.0 - time_ratio
    score = max(formula.weight_perf * perf_norm + formula.weight_speed * speed_norm, 0.0)
    score_se = math.hypot(formula.weight_perf * perf_norm_se, formula.weight_speed * time_ratio_se)
    if not all(map(math.isfinite, (perf_norm, perf_norm_se, speed_norm, score, score_se))):
        raise NotFinite(
            f"score: PerfNorm {perf_norm}, SpeedNorm {speed_norm} (NLL {measurement.nll_nats_per_token}, base "
            f"{baseline.nll_nats_per_token}, time ratio {time_ratio}): the model is broken or was not timed"
        )
    return Score(perf_norm, perf_norm_se, speed_norm, time_ratio_se, score, score_se)


def length_factor(ratio: float | None, se: float | None) -> tuple[float, float]:
    """Return (the factor of a time per token, its standard error) for answers of `ratio` times the base's length.

    The factor is max(ratio, 1). It is 1 without error where nothing was generated.
    """
    if ratio is None or ratio <= 1.0:
        return 1.0, 0.0
    return ratio, se or 0.0


def time_ratio_of(measurement: Measurement, formula: Formula) -> tuple[float, float]:
    """Return (time per token over the base model's as the formula counts it, its standard error)."""
    ratio, se = measurement.time_ratio, measurement.time_ratio_se
    if not formula.penalise_length:
        return ratio, se
    factor, factor_se = length_factor(measurement.length_ratio, measurement.length_ratio_se)
    return ratio * factor, math.hypot(se * factor, ratio * factor_se)


def perf_ratio(name: str, measurement: Measurement, baseline: Measurement) -> tuple[float, float]:
    """Return (Perf / Perf_base, its standard error) of one part of Perf: "perplexity", or a task's name.

    Both errors are paired, and far smaller than either measurement's own. For the perplexity it is the error of the
    mean difference of the shards' NLL, by the delta method. For a task it is the error of the mean over its items of
    (c − ratio · b) / mean(b), where c is the model's correctness and b the base model's. This is the delta method for a
    ratio of means (Cochran, Sampling Techniques, section 2.11).

    Raises:
        ValueError: The two were not measured on the same text or items, or the base model answers no item.
    """
    if name != PERPLEXITY:
        return _task_ratio(name, measurement, baseline)
    if len(measurement.shard_nll) != len(baseline.shard_nll) or measurement.text_digest != baseline.text_digest:
        raise ValueError(
            f"score: measured on text {measurement.text_digest} ({len(measurement.shard_nll)} shards) and the baseline "
            f"on {baseline.text_digest} ({len(baseline.shard_nll)}): measure both on the same text"
        )
    gain = baseline.nll_nats_per_token - measurement.nll_nats_per_token
    try:
        ratio = math.exp(gain)
    except OverflowError:
        ratio = math.inf
    differences = [b - m for b, m in zip(baseline.shard_nll, measurement.shard_nll, strict=True)]
    return ratio, ratio * standard_error(differences)


def _task_ratio(name: str, measurement: Measurement, baseline: Measurement) -> tuple[float, float]:
    for whose, each in (("the model's", measurement), ("the baseline's", baseline)):
        if name not in each.tasks:
            raise ValueError(
                f"score: perf names the task {name}, and {whose} measurement holds "
                f"{', '.join(each.tasks) or 'no task'}: measure it with that task, or take it out of perf"
            )
    model, base = measurement.tasks[name], baseline.tasks[name]
    if model.digest != base.digest or len(model.correct) != len(base.correct):
        raise ValueError(
            f"score: task {name}: {model.items} items ({model.digest}) and the baseline's {base.items} "
            f"({base.digest}) are not the same: measure both on the same items"
        )
    if not base.value > 0:
        raise ValueError(
            f"score: task {name}: the base model answers none of its {base.items} items, and nothing can be compared "
            "with that: take an easier task, or take it out of perf"
        )
    ratio = model.value / base.value
    residuals = [(c - ratio * b) / base.value for c, b in zip(model.correct, base.correct, strict=True)]
    return ratio, standard_error(residuals)


def most_of_tasks(baseline: Measurement) -> dict[str, float]:
    """Return the most that each task of the baseline can give a compressed model, over the base model's accuracy.

    A model that was compressed is no better than its base but by chance: by NO_BETTER standard errors of the difference
    of two models that answer the same number of items independently, and by no more than all items. The base model
    solves some of each task, or nothing could be scored (`perf_ratio`).
    """

    def most(base: TaskResult) -> float:
        by_chance = math.sqrt(2.0 * (1.0 - base.value) / (base.value * base.items))
        return min(1.0 + NO_BETTER * by_chance, 1.0 / base.value)

    return {name: most(base) for name, base in baseline.tasks.items()}


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values; 0 for a single value."""
    n = len(values)
    if n < 2:
        return 0.0
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
