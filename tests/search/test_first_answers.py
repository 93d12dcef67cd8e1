"""When a plan ends after its first answers."""

import dataclasses
import math

import pytest

from evaluator.measure import UNTIMED, Loss, Partial
from evaluator.score import Formula, score_of
from evaluator.tasks import result_of
from search.study import first_answers
from tests.measurements import measurement

FORMULA = Formula(0.5, 0.5, (("perplexity", 1.0), ("quiz", 1.0), ("tale", 2.0)))


def baseline(quiz):
    return measurement(tasks={"quiz": result_of(quiz, "q"), "tale": result_of([1.0, 0.0], "t")})


def partial(correct, tasks=(), ratio=0.8):
    timing = dataclasses.replace(UNTIMED, time_ratio=ratio, time_ratio_se=0.0, time_per_token_ms=4.0, samples=12)
    loss = Loss(2.0 + math.log(2), 0.1, (2.0 + math.log(2),) * 2, 400, math.exp(2.0) * 2)
    return Partial(loss, timing, dict(tasks), "quiz", tuple(correct))


@pytest.mark.parametrize(
    ("model", "base", "lost"),
    [
        ([0.0] * 16, [1.0] * 12 + [0.0] * 4, True),
        ([0.0] * 16, [1.0] * 8 + [0.0] * 8, True),  # p = 0.0078
        ([0.0] * 16, [1.0] * 7 + [0.0] * 9, False),  # p = 0.016
        ([0.0] * 15 + [1.0], [1.0] * 8 + [0.0] * 8, False),  # 8 worse, 1 better: p = 0.039
        ([1.0] * 16, [0.0] * 16, False),  # better
        ([0.1] * 16, [0.5 + 0.01 * i for i in range(16)], True),  # graded
    ],
)
def test_a_model_has_lost_its_ability_by_a_paired_test(model, base, lost):
    found = first_answers.lost(partial(model), baseline([*base, *[1.0] * 20]))
    assert (found is not None) is lost


def test_the_reason_has_numbers_and_names_the_test():
    assert first_answers.lost(partial([0.0] * 16), baseline([1.0] * 12 + [0.0] * 20)) == (
        "task quiz: 0 of the first 16 answers are right and the base model's 12 (exact McNemar, p = 0.00049)"
    )
    graded = first_answers.lost(partial([0.1] * 16), baseline([0.5 + 0.01 * i for i in range(20)]))
    assert "(Wilcoxon, p = " in graded


def test_a_task_that_is_asked_whole_ends_nothing():
    assert first_answers.lost(partial([0.0] * 16), baseline([1.0] * 16)) is None


def test_at_best_the_other_questions_are_answered_as_well_as_the_first_ones_allow():
    base = baseline([1.0] * 32)
    best = first_answers.at_best(partial([0.0] * 16), base)
    upper = 1 - 0.01 ** (1 / 16)
    assert best.tasks["quiz"].value == pytest.approx(upper / 2)
    assert best.tasks["tale"].value == 1.0  # not asked yet
    scored = score_of(best, base, FORMULA)
    assert scored.perf_norm == pytest.approx((0.5 + upper / 2 + 2 * 2.0) / 4)
    assert scored.speed_norm == pytest.approx(0.2)
    known = first_answers.at_best(partial([0.0] * 16, {"tale": result_of([0.0, 1.0], "t")}), base)
    assert known.tasks["tale"].correct == (0.0, 1.0)
