import dataclasses
import json
import math
import random

import pytest

from evaluator import lengths, score
from evaluator.errors import NotFinite
from evaluator.measurement import Measurement
from evaluator.score import Formula, perf_ratio, score_of, standard_error
from evaluator.task_result import Answers, TaskResult
from evaluator.workload import Workload
from tests.measurements import measurement

BASELINE = measurement(
    shard_nll=(1.5, 2.5, 1.75, 2.25),
    time_ratio_se=0.02,
    workload=Workload(batch_sizes=(1, 4)),
    seconds={"nll": 1.0},
    notes=("note",),
)


def result(correct, digest="q"):
    values = tuple(map(float, correct))
    return TaskResult(sum(values) / len(values), standard_error(values), len(values), values, digest)


def measured(gain: float = 0.0, ratio: float = 1.0, spread: float = 0.0) -> Measurement:
    return dataclasses.replace(
        BASELINE,
        nll_nats_per_token=2.0 - gain,
        shard_nll=tuple(
            nll - gain + spread * sign for nll, sign in zip(BASELINE.shard_nll, (1, -1, 1, -1), strict=True)
        ),
        time_ratio=ratio,
    )


def test_a_measurement_survives_json():
    assert Measurement.from_dict(json.loads(json.dumps(BASELINE.to_dict()))) == BASELINE


def test_a_measurement_with_tasks_survives_json_and_an_older_one_is_read():
    asked = dataclasses.replace(BASELINE, tasks={"quiz": result([1, 0, 1])})
    assert Measurement.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked
    older = BASELINE.to_dict()
    del older["tasks"]
    assert Measurement.from_dict(older) == BASELINE


def test_the_baseline_scores_one_half():
    score = score_of(BASELINE, BASELINE, Formula())
    assert (score.perf_norm, score.speed_norm, score.score) == (1.0, 0.0, 0.5)
    assert score.score_se == pytest.approx(0.01)


def test_the_manuals_28_layers_have_the_manuals_score():
    score = score_of(measured(gain=-math.log(3797 / 2660), ratio=1 - 0.182), BASELINE)
    assert score.perf_norm == pytest.approx(0.700, abs=1e-3)
    assert score.score == pytest.approx(0.441, abs=1e-3)


def test_the_error_is_paired():
    """A difference that all shards share has no error, however far the shards lie apart."""
    assert score_of(measured(gain=0.1), BASELINE).perf_norm_se == pytest.approx(0.0, abs=1e-12)
    noisy = score_of(measured(spread=0.01), BASELINE)
    assert noisy.perf_norm_se == pytest.approx(standard_error([0.01, -0.01, 0.01, -0.01]))


def test_weights_count_and_no_score_is_negative():
    score = score_of(measured(gain=-5.0, ratio=3.0), BASELINE, Formula(0.5, 0.5))
    assert score.score == 0.0
    assert score_of(measured(ratio=0.5), BASELINE, Formula(0.0, 1.0)).score == 0.5


@pytest.mark.parametrize("bad", [measured(gain=math.nan), measured(ratio=math.inf), measured(gain=1e4)])
def test_a_broken_measurement_has_no_score(bad):
    with pytest.raises(NotFinite):
        score_of(bad, BASELINE)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="same text"):
        score_of(dataclasses.replace(BASELINE, text_digest="other"), BASELINE)


@pytest.mark.parametrize("wrong", [{"batch_sizes": ()}, {"batch_sizes": (0,)}, {"turns": 1}, {"prompt_tokens": 0}])
def test_workloads_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="workload"):
        Workload(**wrong)


# -- Perf by tasks -------------------------------------------------------------------------------------------


def with_tasks(measurement, **correct):
    return dataclasses.replace(measurement, tasks={name: result(values) for name, values in correct.items()})


def test_the_default_is_perplexity_bit_for_bit():
    """What this function was before there were tasks."""
    generator = random.Random(5)
    for _ in range(50):
        candidate = measured(gain=generator.gauss(0, 0.3), ratio=generator.uniform(0.3, 1.5), spread=generator.random())
        perf_norm = math.exp(2.0 - candidate.nll_nats_per_token)
        differences = [b - m for b, m in zip(BASELINE.shard_nll, candidate.shard_nll, strict=True)]
        found = score_of(candidate, BASELINE)
        assert found.perf_norm == perf_norm
        assert found.perf_norm_se == perf_norm * standard_error(differences)
        assert found.score == max(0.5 * perf_norm + 0.5 * (1.0 - candidate.time_ratio), 0.0)
        assert found.score_se == math.hypot(0.5 * found.perf_norm_se, 0.5 * candidate.time_ratio_se)


def test_perf_norm_is_the_weighted_mean_of_the_ratios():
    """Perplexity 0.8 of the base, quiz 3 of 5 where the base has 4, tale 2 of 4 where it has 1."""
    candidate = with_tasks(measured(gain=math.log(0.8)), quiz=[1, 1, 0, 1, 0], tale=[1, 0, 0, 1])
    baseline = with_tasks(BASELINE, quiz=[1, 1, 1, 1, 0], tale=[1, 0, 0, 0])
    formula = Formula(perf=(("perplexity", 2.0), ("quiz", 1.0), ("tale", 1.0)))
    found = score_of(candidate, baseline, formula)
    assert found.perf_norm == pytest.approx((2 * 0.8 + 0.75 + 2.0) / 4)
    # quiz: c − 0.75·b is .25 .25 −.75 .25 0, over 0.8; its squares' sum 0.75 / 0.64, over 4 · 5
    # tale: c − 2·b is −1 0 0 1, over 0.25; its squares' sum 2 / 0.0625, over 3 · 4
    quiz, tale = math.sqrt(0.75 / 0.64 / 20), math.sqrt(2 / 0.0625 / 12)
    assert perf_ratio("quiz", candidate, baseline) == pytest.approx((0.75, quiz))
    assert perf_ratio("tale", candidate, baseline) == pytest.approx((2.0, tale))
    assert found.perf_norm_se == pytest.approx(math.hypot(quiz, tale) / 4)
    assert found.score == pytest.approx(0.5 * found.perf_norm)


def test_the_text_does_not_matter_where_perf_is_a_task():
    candidate = with_tasks(dataclasses.replace(measured(gain=-3.0), text_digest="other"), quiz=[1, 0])
    found = score_of(candidate, with_tasks(BASELINE, quiz=[1, 1]), Formula(perf=(("quiz", 3.0),)))
    assert found.perf_norm == 0.5


def test_the_error_of_a_task_is_that_of_a_simulation():
    """Items that both models get right together: the ratio's spread over many draws of 200 items."""
    generator = random.Random(11)

    def draw(items=200):
        pairs = []
        for _ in range(items):
            base = generator.random() < 0.6
            pairs.append((base, generator.random() < (0.85 if base else 0.15)))
        baseline, candidate = zip(*pairs, strict=True)
        return perf_ratio("quiz", with_tasks(BASELINE, quiz=candidate), with_tasks(BASELINE, quiz=baseline))

    ratios, errors = zip(*(draw() for _ in range(2000)), strict=True)
    mean = sum(ratios) / len(ratios)
    spread = math.sqrt(sum((ratio - mean) ** 2 for ratio in ratios) / (len(ratios) - 1))
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.06)
    unpaired = mean * math.hypot(*(math.sqrt(p * (1 - p) / 200) / p for p in (0.6, 0.57)))
    assert spread < 0.8 * unpaired


@pytest.mark.parametrize(("accuracy", "items"), [(0.7, 100), (0.5, 60), (0.95, 200)])
def test_what_a_task_can_give_is_more_than_luck_gives_an_equal_model(accuracy, items):
    """Two models of one ability: the ratio of what they answer stays below that in 14 draws of 15 or more."""
    generator = random.Random(3)

    def answers():
        return [float(generator.random() < accuracy) for _ in range(items)]

    right = round(accuracy * items)
    known = with_tasks(BASELINE, quiz=[1.0] * right + [0.0] * (items - right))
    most = score.most_of_tasks(known)["quiz"]
    assert 1.0 < most <= 1.0 / accuracy
    ratios = [sum(answers()) / sum(answers()) for _ in range(2000)]
    assert sum(ratio <= most for ratio in ratios) / len(ratios) > 14 / 15
    assert sum(ratio <= 1.0 + (most - 1.0) / 2 for ratio in ratios) / len(ratios) < 14 / 15


def test_a_model_that_answers_as_the_base_does_has_no_error():
    answers = with_tasks(BASELINE, quiz=[1, 0, 1, 1])
    assert perf_ratio("quiz", answers, answers) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("candidate", "baseline", "says"),
    [
        ({}, {"quiz": [1, 0]}, "the model's measurement holds no task"),
        ({"quiz": [1, 0]}, {"other": [1, 0]}, "the baseline's measurement holds other"),
        ({"quiz": [1, 0]}, {"quiz": [1, 0, 1]}, "2 items .* 3 .* not the same"),
        ({"quiz": [1, 0]}, {"quiz": [0, 0]}, "the base model answers none of its 2 items"),
    ],
)
def test_tasks_that_cannot_be_compared_are_refused(candidate, baseline, says):
    formula = Formula(perf=(("perplexity", 1.0), ("quiz", 1.0)))
    with pytest.raises(ValueError, match=says) as raised:
        score_of(with_tasks(BASELINE, **candidate), with_tasks(BASELINE, **baseline), formula)
    assert "\n" not in str(raised.value)


def test_other_items_under_the_same_name_are_refused():
    candidate = dataclasses.replace(BASELINE, tasks={"quiz": result([1, 0], "a")})
    baseline = dataclasses.replace(BASELINE, tasks={"quiz": result([1, 0], "b")})
    with pytest.raises(ValueError, match="same items"):
        perf_ratio("quiz", candidate, baseline)


@pytest.mark.parametrize("perf", [(), (("quiz", 0.0),), (("quiz", -1.0), ("x", 2.0)), (("q", 1.0), ("q", 1.0))])
def test_formulas_that_make_no_sense_are_refused(perf):
    with pytest.raises(ValueError, match="score: "):
        Formula(perf=perf)


def test_a_formula_can_come_from_json():
    assert Formula(perf=[["quiz", 1]]) == Formula(perf=(("quiz", 1.0),))


# -- lengths of answers --------------------------------------------------------------------------------------


def with_lengths(tokens, base, ratio=1.0, gain=0.0):
    """A candidate and its baseline, whose answers have so many tokens."""

    def answering(measurement, lengths):
        answered = dataclasses.replace(result([1] * len(lengths)), answers=Answers(tuple(lengths), 0.0, 0.0, 0.0))
        return dataclasses.replace(measurement, tasks={"quiz": answered})

    baseline = answering(BASELINE, base)
    return lengths.with_ratio(answering(measured(gain=gain, ratio=ratio), tokens), baseline), baseline


def test_longer_answers_make_a_model_slower_only_where_they_are_to():
    candidate, baseline = with_lengths([30, 45], [10, 15], ratio=0.25)
    assert (candidate.length_ratio, candidate.length_ratio_se) == (3.0, 0.0)
    assert score_of(candidate, baseline).speed_norm == 0.75
    found = score_of(candidate, baseline, Formula(penalise_length=True))
    assert (found.speed_norm, found.score) == (0.25, 0.625)
    assert found.speed_norm_se == pytest.approx(3 * candidate.time_ratio_se)


def test_the_error_of_the_lengths_goes_into_that_of_the_speed():
    candidate, baseline = with_lengths([10, 50], [20, 20], ratio=0.5)
    se = candidate.length_ratio_se
    assert se == pytest.approx(1.0)
    found = score_of(candidate, baseline, Formula(penalise_length=True))
    assert found.speed_norm == pytest.approx(1 - 0.5 * 1.5)
    assert found.speed_norm_se == pytest.approx(math.hypot(1.5 * candidate.time_ratio_se, 0.5 * se))


@pytest.mark.parametrize("tokens", [[0, 0], [5, 5], [10, 15]])
def test_shorter_answers_earn_nothing(tokens):
    """Else a model that ends every answer at once would be the fastest of all."""
    candidate, baseline = with_lengths(tokens, [10, 15], ratio=0.8)
    assert score_of(candidate, baseline, Formula(penalise_length=True)) == score_of(candidate, baseline)


def test_lengths_count_for_nothing_where_nothing_is_generated():
    assert lengths.with_ratio(measured(), BASELINE) == measured()
    assert score_of(measured(ratio=0.5), BASELINE, Formula(penalise_length=True)).speed_norm == 0.5
    assert "penalise_length" not in Formula().to_dict()
    assert Formula(penalise_length=True).to_dict()["penalise_length"] is True
    assert not {"length_ratio", "tokens_per_answer", "seconds_per_answer"} & BASELINE.to_dict().keys()


def test_a_warning_names_the_task_and_why():
    candidate, baseline = with_lengths([30, 45], [10, 15])
    assert lengths.warning(candidate, baseline, 0.1) == (
        "lengths of answers differ (quiz: 3.00 ± 0.00 times the base model's tokens): "
        "the time per token does not show that"
    )
    assert lengths.warning(candidate, baseline, 2.0) is None
    assert lengths.warning(baseline, baseline, 0.0) is None
    assert lengths.warning(measured(), BASELINE, 0.0) is None
