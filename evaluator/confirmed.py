"""Pure functions that join pairs of engine processes to one time ratio, and say what a difference is worth.

A pair is a fresh process of the candidate and a fresh one of the base model, timed in turn. Its time ratio has two
errors: the one within the pair, which its turns show, and the one between processes, which only other pairs show. Three
pairs alone would say little about the second: Student's t with 2 degrees of freedom multiplies it by 4.3. So it is
pooled over all candidates that were confirmed together, and moderated as by Smyth (2004,
https://doi.org/10.2202/1544-6115.1027):

    x_cj, w_cj   time ratio of pair j of candidate c, and its standard error within the pair
    S²  = Σ_c Σ_j (x_cj − mean_c)² / Σ_c (n_c − 1)    variance of one pair, as the pairs scatter; d degrees of freedom
    P_c = TAU² + mean_j w_cj²                         variance of one pair, as it is expected; worth PRIOR degrees
    V_c = max(S², (d · S² + PRIOR · P_c) / (d + PRIOR))
    se_c = sqrt(V_c / n_c), with d degrees of freedom where S² is the larger, else d + PRIOR

The candidates of a round share the base model's process, so that their deviations are correlated by a half. The degrees
of freedom are d = Σ_c (n_c − 1) / (1 + (C − 1) / 4) for C candidates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from scipy.special import stdtrit

from evaluator.measurement import Timing
from evaluator.speed import surely_slower

LEVEL = 0.95
TAU = 0.005  # expected standard deviation of the time ratio between pairs of processes, on a GPU
TAU_CPU = 0.015  # the same on a CPU: five pairs of a 135M model on two cores, in two runs, scattered by 0.015
PRIOR = 4.0  # degrees of freedom that the expectation is worth
MOST_PAIRS, MOST_TEXT = 1000, 128  # pairs, and times the text: no verdict asks for more


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its standard error and the degrees of freedom of that error."""

    value: float
    se: float
    degrees: float

    @property
    def half_width(self) -> float:
        """Half of the width of the interval that holds the true number in 95 of 100 cases."""
        return 0.0 if self.se == 0 else _quantile(self.degrees) * self.se


@dataclasses.dataclass(frozen=True)
class TimeRatio:
    """The time ratio of a candidate over several pairs.

    Attributes:
        estimate: The mean over the pairs.
        pairs: The number of pairs.
        between: The standard deviation of the ratio between pairs, without the errors within, over all candidates.
    """

    estimate: Estimate
    pairs: int
    between: float


def time_ratios(candidates: Sequence[Sequence[Timing]], expected: float = TAU) -> list[TimeRatio]:
    """Return the time ratio of each candidate from the timings of its pairs; see the module's text.

    Args:
        candidates: The timings of each candidate's pairs.
        expected: The expected standard deviation between pairs, TAU in the module's text.

    Raises:
        ValueError: A candidate has no pair.
    """
    if not all(candidates):
        raise ValueError("confirmed: a candidate without a pair has no time ratio")
    means = [math.fsum(pair.time_ratio for pair in pairs) / len(pairs) for pairs in candidates]
    within = [math.fsum(pair.time_ratio_se**2 for pair in pairs) / len(pairs) for pairs in candidates]
    squares = math.fsum(
        (pair.time_ratio - mean) ** 2 for pairs, mean in zip(candidates, means, strict=True) for pair in pairs
    )
    free = sum(len(pairs) - 1 for pairs in candidates)
    scatter = squares / free if free else 0.0
    expected_within = (
        math.fsum(w * (len(pairs) - 1) for w, pairs in zip(within, candidates, strict=True)) / free if free else 0.0
    )
    repeated = sum(len(pairs) > 1 for pairs in candidates)
    degrees = free / (1 + (repeated - 1) / 4) if free else 0.0
    between = math.sqrt(max(scatter - expected_within, 0.0))
    found = []
    for pairs, mean, error in zip(candidates, means, within, strict=True):
        moderated = (degrees * scatter + PRIOR * (expected**2 + error)) / (degrees + PRIOR)
        own = scatter > moderated
        estimate = Estimate(
            mean, math.sqrt((scatter if own else moderated) / len(pairs)), degrees if own else degrees + PRIOR
        )
        found.append(TimeRatio(estimate, len(pairs), between))
    return found


# -- slow processes ------------------------------------------------------------------------------------------


def slow(pairs: Sequence[Timing]) -> list[int]:
    """Return the numbers of the pairs in which a process was slow for its whole life, the slowest last.

    Its time is `surely_slower` than the least of the same model over the pairs, by the error of the difference: on a
    noisy machine a difference says less.
    """
    excess: dict[int, float] = {}
    for times in (
        [(pair.time_per_token_ms, pair.time_per_token_ms_se) for pair in pairs],
        [(pair.base_time_per_token_ms, pair.base_time_per_token_ms_se) for pair in pairs],
    ):
        least, error = min(times, default=(0.0, 0.0))
        for number, (time, own) in enumerate(times):
            if surely_slower(time, math.hypot(error, own), least):
                excess[number] = max(excess.get(number, 0.0), time / least)
    return sorted(excess, key=lambda number: excess[number])


def kept(pairs: Sequence[Timing], wanted: int) -> list[int]:
    """Return the numbers of the pairs that count: all but slow ones, of which the least slow fill up to `wanted`."""
    slow_ones = slow(pairs)
    good = [number for number in range(len(pairs)) if number not in slow_ones]
    return sorted([*good, *slow_ones[: max(0, wanted - len(good))]])


# -- verdicts ------------------------------------------------------------------------------------------------


def joined(parts: Sequence[tuple[float, Estimate]]) -> Estimate:
    """Return the weighted sum of independent estimates, with the degrees of freedom of Welch and Satterthwaite."""
    value = math.fsum(weight * one.value for weight, one in parts)
    variances = [((weight * one.se) ** 2, one.degrees) for weight, one in parts if weight * one.se > 0]
    total = math.fsum(variance for variance, _ in variances)
    if total == 0:
        return Estimate(value, 0.0, math.inf)
    degrees = total**2 / math.fsum(variance**2 / max(free, 1.0) for variance, free in variances)
    return Estimate(value, math.sqrt(total), degrees)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a difference is worth at 95%.

    Attributes:
        word: One of the three words that were given, or UNDECIDED.
        text: The word with the difference, its interval, and what would decide it where it is undecided.
    """

    word: str
    text: str


UNDECIDED = "UNDECIDED"
SCORE_WORDS = ("BETTER", "SAME", "WORSE")
SPEED_WORDS = ("FASTER", "SAME", "SLOWER")
BOUND_WORDS = ("HOLDS", "HOLDS", "MISSES")  # a bound that is reached exactly holds


def verdict(
    difference: Estimate,
    margin: float,
    words: tuple[str, str, str] = SCORE_WORDS,
    *,
    pairs: int = 0,
    timed: float = 1.0,
) -> Verdict:
    """Return whether a difference from the base model, of which more is better, is one.

    SAME is an equivalence test: the whole interval lies within ± `margin`. A difference of which that is known makes no
    difference, even where it is surely not 0. Else the sign is known where the interval holds no 0.

    Args:
        difference: The difference from the base model.
        margin: The largest difference that makes none.
        words: The words for more, the same and less.
        pairs: The number of pairs that were timed, to say how many more would decide; 0: none.
        timed: The share of the difference's variance that more pairs make smaller.
    """
    half = difference.half_width
    shown = f"{difference.value:+.4f}".replace("-", "−") + f" ± {half:.4f}"
    more, same, less = words
    if abs(difference.value) + half <= margin:
        return Verdict(same, f"{same}: {shown}, within ±{margin:g}")
    if abs(difference.value) > half:
        word = more if difference.value > 0 else less
        return Verdict(word, f"{word}: {shown}")
    return Verdict(UNDECIDED, f"{UNDECIDED}: {shown}; {_what_decides(difference, margin, pairs, timed)}")


def _quantile(degrees: float) -> float:
    """Return half of the width, in standard errors, of the interval that holds the true number at LEVEL."""
    return float(stdtrit(degrees, (1 + LEVEL) / 2))


def _what_decides(difference: Estimate, margin: float, pairs: int, timed: float) -> str:
    """Say how many more pairs, or how much more text, would make the interval small enough for a verdict."""
    needed = max(abs(difference.value), margin - abs(difference.value))
    of_time, of_text = timed * difference.se**2, (1 - timed) * difference.se**2

    def enough(number: int, text: float) -> bool:
        degrees = difference.degrees * max((number - 1) / max(pairs - 1, 1), 1.0)
        return _quantile(degrees) * math.sqrt(of_time * pairs / max(number, 1) + of_text / text) < needed

    if pairs and of_time:
        for number in range(pairs + 1, MOST_PAIRS):
            if enough(number, 1.0):
                return f"about {number - pairs} more pairs would decide it"
    for times in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, MOST_TEXT):
        if enough(pairs, times):
            return f"about {times} times the report text would decide it"
    for times in (2, 4, 8, 16, 32, 64, MOST_TEXT):
        if pairs and enough(times * pairs, times):
            return f"about {(times - 1) * pairs} more pairs and {times} times the report text would decide it"
    if not pairs:
        return f"more than {MOST_TEXT} times the report text would be needed to decide it"
    return f"more than {MOST_PAIRS} pairs would be needed to decide it: for what people notice it is the same"
