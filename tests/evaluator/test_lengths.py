import json
import math

import pytest

from evaluator import lengths
from evaluator.generation import Answer
from evaluator.task_result import Answers, ShownAnswer, TaskResult


def answer(tokens, text="text", finish="stop"):
    return Answer(tuple(tokens), text, finish, 0.0, 0.1, 0.2)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([5] * 24, True),
        ([5] * 23, False),
        ([1, 2, 3] * 8, True),
        ([1, 2, 3] * 8 + [1], True),  # the cycle may end anywhere
        (list(range(50)) + [1, 2, 3] * 8, True),
        ([1, 2, 3] * 8 + [9], False),
        (list(range(64)) * 4, True),
        (list(range(65)) * 5, False),  # a longer cycle is no repetition
        (list(range(64)) * 3 + list(range(63)), False),
        (list(range(30)) * 3, False),  # 3 times is too few
        (list(range(100)), False),
        ([], False),
    ],
)
def test_an_endless_repetition(tokens, found):
    assert lengths.repeats(tokens) is found


def test_what_is_kept_of_answers():
    rambling = answer([7] * 64, "so so so", "length")
    found = lengths.answers_of(
        [rambling, answer([]), answer([1], " \n"), answer([7] * 30), answer(range(64), "x", "length")],
        [f"q{i}" for i in range(5)],
        list("abcde"),
    )
    assert found.tokens == (64, 0, 1, 30, 64)
    assert (found.cut, found.repeating, found.empty) == (0.4, 0.2, 0.2)
    assert found.shown[0] == ShownAnswer("q0", "a", "so so so")
    many = lengths.answers_of([answer([1], "x" * 9000)] * 30, ["q"] * 30, ["a"] * 30)
    assert len(many.shown) == 10
    assert len(many.shown[0].text) == 2000


def test_quantiles():
    found = lengths.of([*range(1, 101)])
    assert (found.mean, found.p50, found.p90, found.p99) == pytest.approx((50.5, 50.5, 90.1, 99.01))
    assert lengths.of([7]) == lengths.Lengths(7, 7, 7, 7)


def test_the_ratio_and_its_paired_error():
    assert lengths.ratio([20, 40, 60], [10, 20, 30]) == (2.0, 0.0)  # each answer is twice as long
    found, se = lengths.ratio([10, 30], [20, 20])
    assert (found, se) == (1.0, pytest.approx(0.5))
    assert lengths.ratio([0, 0], [10, 10]) == (0.0, 0.0)
    assert lengths.ratio([5, 5], [0, 0])[0] == 5.0  # against a base model that says nothing
    with pytest.raises(ValueError, match="2 answers and the base model's 1"):
        lengths.ratio([1, 2], [1])


@pytest.mark.parametrize(
    ("ratio", "se", "differs"),
    [(1.0, 0.0, False), (1.11, 0.0, True), (0.89, 0.0, True), (1.11, 0.02, False), (1.3, 0.1, True), (12, 3, True)],
)
def test_the_tolerance_counts_beyond_the_error(ratio, se, differs):
    assert lengths.differ(ratio, se, 0.1) is differs


def test_a_result_survives_json():
    answers = Answers((3, 4), 0.5, 0.0, 0.0, (ShownAnswer("q", "a", "text"),))
    for result in (TaskResult(0.5, 0.5, 2, (1.0, 0.0), "d", answers), TaskResult(0.5, 0.5, 2, (1.0, 0.0))):
        assert TaskResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert "answers" not in TaskResult(1.0, 0.0, 1, (1.0,)).to_dict()
    assert not math.isnan(answers.cut)
