import math

import pytest

from evaluator import paired


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (0, 8, 2 / 256),
        (8, 0, 2 / 256),
        (1, 9, 2 * 11 / 1024),
        (5, 5, 1.0),
        (10, 16, 0.3268),  # R: mcnemar.exact (package exact2x2) and binom.test(10, 26)
        (86, 150, 3.7e-5),  # Agresti, Categorical Data Analysis: approval ratings; χ² = 17.36 without the correction
    ],
)
def test_mcnemar(better, worse, p):
    assert paired.mcnemar(better, worse) == pytest.approx(p, rel=0.02)


def test_a_comparison_is_paired():
    base = [1.0] * 8 + [0.0] * 8
    model = [1.0] * 7 + [0.0] + [0.0] * 7 + [1.0]
    found = paired.compare(model, base)
    assert (found.difference, found.better, found.worse, found.p) == (0.0, 1, 1, 1.0)
    assert found.se == pytest.approx(math.sqrt(2 / 15 / 16))
    same = paired.compare(base, base)
    assert (same.difference, same.se, same.p) == (0.0, 0.0, 1.0)
    assert paired.compare([0.0] * 16, base).p == pytest.approx(2 / 256)


def test_graded_answers_take_the_signed_rank_test():
    base = [0.5, 0.6, 0.7, 0.8, 0.9, 0.55]
    model = [value - 0.01 * place for place, value in enumerate(base, start=1)]
    assert paired.compare(model, base).p == pytest.approx(2 / 64)  # all six ranks on one side
    assert paired.compare(base, base).p == 1.0


def test_what_can_not_be_paired_is_refused():
    with pytest.raises(ValueError, match="2 scores and the base model's 1"):
        paired.compare([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="paired"):
        paired.compare([], [])


def test_the_most_that_an_accuracy_may_be():
    assert paired.highest_accuracy([0.0] * 16) == pytest.approx(1 - 0.01 ** (1 / 16))
    assert paired.highest_accuracy([1.0] * 16) == 1.0
    assert paired.highest_accuracy([0.2] * 16) == paired.highest_accuracy([1.0] * 4 + [0.0] * 12)
