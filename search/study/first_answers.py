"""Decides whether a plan ends after its first answers: because it can't answer any more, and can't win without.

Both must hold:

    1. On the first questions the model is worse than the base model by a paired test, p < P: the exact McNemar test, or
       Wilcoxon's signed-rank test where answers score between 0 and 1.
    2. The plan can't become the best trial even if its accuracy on the other questions is the highest that the first
       ones allow at 99% (Clopper and Pearson), and it answers all questions of tasks that are still to come. Time and
       perplexity are those that were measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from evaluator import measure, paired
from evaluator.measure import Partial
from evaluator.measurement import Measurement
from evaluator.task_result import TaskResult
from evaluator.tasks import result_of

P = 0.01  # by the exact McNemar test that takes 8 questions that the base model alone answers


def lost(known: Partial, baseline: Measurement) -> str | None:
    """Say how a model answers the first questions of a task where it lost its ability to; None where it did not."""
    first = baseline.tasks[known.task].correct[: len(known.correct)]
    if len(first) == baseline.tasks[known.task].items:  # nothing is left to be saved
        return None
    compared = paired.compare(known.correct, first)
    if compared.difference >= 0 or compared.p >= P:
        return None
    test = "exact McNemar" if {*known.correct, *first} <= {0.0, 1.0} else "Wilcoxon"
    return (
        f"task {known.task}: {sum(known.correct):g} of the first {len(first)} answers are right and the base model's "
        f"{sum(first):g} ({test}, p = {compared.p:.2g})"
    )


def at_best(known: Partial, baseline: Measurement) -> Measurement:
    """Return the best measurement that a model can still get; what does not enter a Score is the base model's."""
    tasks: dict[str, TaskResult] = {}
    for name, base in baseline.tasks.items():
        if name in known.tasks:
            tasks[name] = known.tasks[name]
        elif name == known.task:
            most = paired.highest_accuracy(known.correct)
            tasks[name] = _result([*known.correct, *[most] * (base.items - len(known.correct))], base)
        else:
            tasks[name] = _result([1.0] * base.items, base)
    loss = known.loss
    best = dataclasses.replace(
        baseline,
        perplexity=loss.perplexity,
        nll_nats_per_token=loss.nll,
        nll_nats_per_token_se=loss.se,
        shard_nll=loss.shard_nll,
        tasks=tasks,
        length_ratio=None,
        length_ratio_se=None,
    )
    return measure.with_timing(best, known.timing)


def _result(correct: Sequence[float], base: TaskResult) -> TaskResult:
    return result_of(correct, base.digest)
