"""Pure functions that compare two models on the same questions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from evaluator.score import standard_error


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How a model's answers differ from the base model's on the same questions.

    Attributes:
        difference: The mean of the model's scores minus the base model's.
        se: Its standard error, paired: that of the mean of the questions' differences.
        better: The number of questions that the model answers better.
        worse: The number of questions that it answers worse.
        p: The two-sided p-value, under the hypothesis that neither is better. It is that of the exact McNemar test
            where all scores are 0 or 1, else of Wilcoxon's signed-rank test.
    """

    difference: float
    se: float
    better: int
    worse: int
    p: float

    @property
    def text(self) -> str:
        """The numbers as people read them."""
        return f"{self.difference:+.3f} ± {self.se:.3f}, {self.better} better, {self.worse} worse, p = {self.p:.2g}"


def compare(model: Sequence[float], base: Sequence[float]) -> Comparison:
    """Compare the scores of two models on the same questions, from 0 to 1 each.

    Raises:
        ValueError: The questions are not as many, or there is none.
    """
    if len(model) != len(base) or not model:
        raise ValueError(f"paired: {len(model)} scores and the base model's {len(base)}: ask both the same questions")
    differences = [own - its for own, its in zip(model, base, strict=True)]
    better, worse = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    binary = all(value in (0.0, 1.0) for value in (*model, *base))
    return Comparison(
        difference=math.fsum(differences) / len(differences),
        se=standard_error(differences),
        better=better,
        worse=worse,
        p=mcnemar(better, worse) if binary else _signed_rank(differences),
    )


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Of the questions that two models answer differently, each is as likely to be better under the hypothesis: the
    binomial test of `better` among `better + worse` at 1/2 (McNemar 1947, https://doi.org/10.1007/BF02295996).
    """
    from scipy.stats import binomtest  # here and below: a second of importing, which only answers need

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def highest_accuracy(scores: Sequence[float], level: float = 0.99) -> float:
    """Return the highest accuracy that a model may have that answered some questions so: the end of an interval.

    One-sided Clopper and Pearson (1934, https://doi.org/10.1093/biomet/26.4.404); the sum of the scores is rounded up.

    Args:
        scores: The scores of the questions that were answered, from 0 to 1.
        level: The probability with which the interval holds the accuracy.
    """
    from scipy.stats import binomtest

    right = min(math.ceil(math.fsum(scores)), len(scores))
    found = binomtest(right, len(scores), alternative="less").proportion_ci(level, method="exact")
    return float(found.high)


def _signed_rank(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test (1945, https://doi.org/10.2307/3001968)."""
    from scipy.stats import wilcoxon

    unequal = [each for each in differences if each]
    return float(wilcoxon(unequal).pvalue) if unequal else 1.0
