"""Pure functions for the lengths of generated answers, next to the base model's on the same prompts.

A time per token does not show that a model writes more tokens than it should, or stops at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from evaluator.generation import Answer
from evaluator.measurement import Measurement
from evaluator.score import standard_error
from evaluator.task_result import Answers, ShownAnswer, TaskResult

TOLERANCE = 0.1  # the difference of a ratio from 1 that makes none where nothing else is asked
SHOWN = 10  # answers of a task that are kept for a report, from the first
MOST_SHOWN = 2000  # characters of one of them
PERIOD = 64  # tokens of the longest cycle that counts as a repetition
REPEATS = 4  # times that a cycle must follow itself
LEAST = 24  # tokens that all of its repeats must have together


def repeats(tokens: Sequence[int], *, period: int = PERIOD, times: int = REPEATS, least: int = LEAST) -> bool:
    """Return whether tokens end in a cycle.

    They do where, for some p from 1 to `period`, the last n tokens repeat every p tokens. n is `times` · p, and at
    least `least`.
    """
    for each in range(1, period + 1):
        wanted = max(times * each, least)
        if wanted > len(tokens):
            if times * each > len(tokens):
                break
            continue
        end = tokens[-wanted:]
        if all(end[place] == end[place - each] for place in range(each, wanted)):
            return True
    return False


def answers_of(found: Sequence[Answer], questions: Sequence[str], expected: Sequence[str]) -> Answers:
    """Return what is kept of generated answers.

    An answer is cut off where it reached the limit of tokens. It repeats endlessly where it was cut off in a cycle,
    see `repeats`. It is empty where its text is white space alone.

    Args:
        found: The answers, at least one.
        questions: What was asked, as people read it.
        expected: The right answers, as people read them.
    """
    cut = [answer.finish == "length" for answer in found]
    return Answers(
        tokens=tuple(len(answer.tokens) for answer in found),
        cut=sum(cut) / len(found),
        empty=sum(not answer.text.strip() for answer in found) / len(found),
        repeating=sum(was and repeats(answer.tokens) for was, answer in zip(cut, found, strict=True)) / len(found),
        shown=tuple(
            ShownAnswer(question[-MOST_SHOWN:], right[:MOST_SHOWN], answer.text[:MOST_SHOWN])
            for question, right, answer in zip(questions[:SHOWN], expected, found, strict=False)
        ),
    )


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The mean and quantiles of the number of generated tokens."""

    mean: float
    p50: float
    p90: float
    p99: float


def of(tokens: Sequence[int]) -> Lengths:
    """Return the mean and the quantiles of numbers of tokens, at least one; quantiles lie between two by proportion."""
    ordered = sorted(tokens)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return Lengths(sum(ordered) / len(ordered), quantile(0.5), quantile(0.9), quantile(0.99))


def ratio(tokens: Sequence[int], base: Sequence[int]) -> tuple[float, float]:
    """Return the mean number of tokens over the base model's on the same prompts, and its standard error.

    The error is paired: that of the mean of (tokens − ratio · base) / mean(base), the delta method for a ratio of means
    (Cochran, Sampling Techniques, section 2.11). A mean of the base model below one token counts as one.

    Raises:
        ValueError: The prompts are not as many, or there is none.
    """
    if len(tokens) != len(base) or not tokens:
        raise ValueError(f"lengths: {len(tokens)} answers and the base model's {len(base)}: ask both the same prompts")
    mean = max(sum(base) / len(base), 1.0)
    found = sum(tokens) / len(tokens) / mean
    return found, standard_error([(own - found * its) / mean for own, its in zip(tokens, base, strict=True)])


def differ(found: float, se: float, tolerance: float) -> bool:
    """Return whether a ratio of lengths differs from 1 by more than the tolerance beyond its standard error."""
    return abs(found - 1.0) > tolerance + se


# -- of measurements -----------------------------------------------------------------------------------------


def answered(measured: Measurement) -> dict[str, TaskResult]:
    """Return the results of the tasks that let the model generate, by name."""
    return {name: result for name, result in measured.tasks.items() if result.answers is not None}


def mean_of(tasks: dict[str, TaskResult]) -> float | None:
    """Return the mean number of tokens of all answers of all tasks; None where none lets the model generate."""
    tokens = _tokens(tasks)
    return sum(tokens) / len(tokens) if tokens else None


def with_ratio(measured: Measurement, baseline: Measurement) -> Measurement:
    """Return the measurement with the length of its answers over the base model's; the same where nothing generates.

    All answers of all tasks count alike.
    """
    own, base = _tokens(measured.tasks), _tokens(baseline.tasks)
    if not own or len(own) != len(base):
        return measured
    found, se = ratio(own, base)
    return dataclasses.replace(measured, length_ratio=found, length_ratio_se=se)


def warning(measured: Measurement, baseline: Measurement, tolerance: float) -> str | None:
    """Say in a line which answers are longer or shorter than the base model's by more than the tolerance; None: none.

    Args:
        measured: A model's measurement.
        baseline: The base model's, with the same tasks.
        tolerance: The largest difference of a ratio from 1 that makes none, beyond its standard error.
    """
    told = []
    for name, result in answered(measured).items():
        base = baseline.tasks.get(name)
        if result.answers is None or base is None or base.answers is None or base.items != result.items:
            continue
        found, se = ratio(result.answers.tokens, base.answers.tokens)
        if differ(found, se, tolerance):
            told.append(f"{name}: {found:.2f} ± {se:.2f} times the base model's tokens{_why(result.answers)}")
    if not told:
        return None
    return f"lengths of answers differ ({'; '.join(told)}): the time per token does not show that"


def _why(answers: Answers) -> str:
    shares = ((answers.cut, "cut off"), (answers.repeating, "repeating"), (answers.empty, "empty"))
    parts = [f"{share:.0%} {word}" for share, word in shares if share]
    return f", {', '.join(parts)}" if parts else ""


def _tokens(tasks: dict[str, TaskResult]) -> list[int]:
    return [count for result in tasks.values() if result.answers is not None for count in result.answers.tokens]
