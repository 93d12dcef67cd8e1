"""Confirmation's arithmetic: errors that cover the truth whatever the processes do, and verdicts that follow."""

import math

import numpy as np
import pytest

from evaluator import confirmed
from evaluator.confirmed import SPEED_WORDS, Estimate
from evaluator.measurement import Timing

TRUTH = 0.93


def pair(ratio=1.0, within=0.004, time=2.0, base=2.0, error=0.001):
    return Timing(time, error, base, error, ratio, within, samples=96)


def simulated(random, candidates, pairs, between, within):
    """Candidates of one true ratio; a pair's error is half the base process's, which all candidates share."""
    base = random.normal(0, between / math.sqrt(2), pairs)
    own = random.normal(0, between / math.sqrt(2), (candidates, pairs))
    turns = random.normal(0, within, (candidates, pairs))
    return [[pair(TRUTH + value, within) for value in row] for row in own + base + turns]


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("between", [0.0, 0.003, 0.01, 0.03])
def test_the_interval_holds_the_truth_in_95_of_100_studies(candidates, between):
    random, hits, studies = np.random.default_rng(7), 0, 500
    for _ in range(studies):
        first = confirmed.time_ratios(simulated(random, candidates, 3, between, 0.004))[0].estimate
        hits += abs(first.value - TRUTH) <= first.half_width
    assert hits / studies > 0.93


def test_candidates_confirmed_together_share_what_is_known_of_processes():
    random = np.random.default_rng(3)
    alone, together = [], []
    for _ in range(200):
        pairs = simulated(random, 3, 3, 0.02, 0.004)
        alone.append(confirmed.time_ratios(pairs[:1])[0].estimate.half_width)
        together.append(confirmed.time_ratios(pairs)[0].estimate.half_width)
    assert np.median(together) < 0.85 * np.median(alone)
    assert np.std(together) < 0.7 * np.std(alone)


def test_errors_within_pairs_alone_are_no_reason_for_confidence():
    """Three pairs that happen to agree are still expected to differ by what processes usually differ."""
    (found,) = confirmed.time_ratios([[pair(0.9, 1e-5)] * 3])
    assert found.estimate.value == pytest.approx(0.9)
    assert found.between == 0
    assert found.estimate.se == pytest.approx(confirmed.TAU * math.sqrt(4 / 6) / math.sqrt(3), rel=1e-3)
    (noisy,) = confirmed.time_ratios([[pair(0.9, 0.02)] * 3])
    assert noisy.estimate.se > 2 * found.estimate.se


def test_one_pair_has_an_error_too():
    (found,) = confirmed.time_ratios([[pair(0.9, 0.003)]])
    assert found.estimate.se == pytest.approx(math.hypot(confirmed.TAU, 0.003))
    assert found.estimate.half_width > 2.5 * found.estimate.se  # four degrees of freedom
    with pytest.raises(ValueError, match="without a pair"):
        confirmed.time_ratios([[]])


# -- slow processes ------------------------------------------------------------------------------------------


def test_a_process_that_is_slow_for_its_whole_life_is_found_on_either_side():
    good = [pair(), pair(time=2.02), pair(base=2.03)]
    assert confirmed.slow(good) == []
    assert confirmed.slow([*good, pair(time=2.26)]) == [3]
    assert confirmed.slow([pair(base=2.26), *good]) == [0]
    assert confirmed.slow([pair(time=2.1), *good, pair(time=2.5)]) == [0, 4]


def test_on_a_noisy_machine_a_difference_within_its_error_is_no_slow_process():
    assert confirmed.slow([pair(error=0.1), pair(time=2.3, error=0.1)]) == []
    assert confirmed.slow([pair(error=0.01), pair(time=2.3, error=0.01)]) == [1]


def test_slow_pairs_count_only_where_there_are_too_few_others():
    slow, slower = pair(time=2.1), pair(time=2.5)
    assert confirmed.kept([slow, pair(), pair(), pair()], 3) == [1, 2, 3]
    assert confirmed.kept([slower, pair(), slow, pair()], 3) == [1, 2, 3]  # the least slow one
    assert confirmed.kept([pair()] * 5, 3) == [0, 1, 2, 3, 4]  # more pairs are never thrown away


def test_a_slow_process_does_not_move_the_ratio():
    pairs = [pair(0.9), pair(1.017, time=2.26), pair(0.9), pair(0.9)]
    counted = [pairs[number] for number in confirmed.kept(pairs, 3)]
    assert confirmed.time_ratios([counted])[0].estimate.value == pytest.approx(0.9)


# -- verdicts ------------------------------------------------------------------------------------------------

EXACT = math.inf  # degrees of freedom


@pytest.mark.parametrize(
    ("value", "se", "word"),
    [
        (0.02, 0.005, "BETTER"),
        (-0.02, 0.005, "WORSE"),
        (0.001, 0.002, "SAME"),
        (-0.001, 0.002, "SAME"),
        (0.0, 0.004, "UNDECIDED"),  # not different, and not shown to be the same
        (0.004, 0.0015, "BETTER"),
        (0.004, 0.0009, "SAME"),  # surely not 0, and surely no difference that counts
        (0.01, 0.006, "UNDECIDED"),
        (0.0, 0.0, "SAME"),
        (0.3, 0.0, "BETTER"),
    ],
)
def test_verdicts(value, se, word):
    found = confirmed.verdict(Estimate(value, se, EXACT), 0.006, pairs=3)
    assert found.word == word
    assert found.text.startswith(f"{word}: ")
    assert ("would decide it" in found.text) == (word == "UNDECIDED")


def test_the_words_for_speed():
    assert confirmed.verdict(Estimate(0.07, 0.005, 4), 0.012, SPEED_WORDS).word == "FASTER"
    assert confirmed.verdict(Estimate(-0.07, 0.005, 4), 0.012, SPEED_WORDS).word == "SLOWER"


def test_few_degrees_of_freedom_ask_for_more():
    assert confirmed.verdict(Estimate(0.02, 0.008, EXACT), 0.006).word == "BETTER"
    assert confirmed.verdict(Estimate(0.02, 0.008, 2), 0.006, pairs=3).word == "UNDECIDED"


def test_what_would_decide_it_does():
    """As many more pairs as it asks for make the interval small enough, and a third of them do not."""
    estimate = Estimate(0.008, 0.006, 8.0)
    text = confirmed.verdict(estimate, 0.006, pairs=3).text
    more = int(text.split("about ")[1].split()[0])

    def after(pairs):
        degrees = 8.0 * (pairs - 1) / 2
        return confirmed.verdict(Estimate(0.008, 0.006 * math.sqrt(3 / pairs), degrees), 0.006, pairs=pairs).word

    assert after(3 + more) == "BETTER"
    assert after(3 + more // 3) == "UNDECIDED"


def test_no_number_of_pairs_decides_what_was_not_timed():
    text = confirmed.verdict(Estimate(0.0003, 0.002, 15.0), 0.0, confirmed.BOUND_WORDS, timed=0.0).text
    assert text.startswith("UNDECIDED: ")
    assert text.endswith("more than 128 times the report text would be needed to decide it")


def test_where_the_text_is_too_short_more_pairs_are_not_asked_for():
    text = confirmed.verdict(Estimate(0.01, 0.006, 20.0), 0.006, pairs=3, timed=0.02).text
    assert "times the report text" in text
    assert "pairs" not in text


def test_joined_errors_lie_between_those_of_their_parts():
    speed, perf = Estimate(-0.02, 0.006, 4.0), Estimate(0.01, 0.006, 15.0)
    both = confirmed.joined([(0.5, perf), (0.5, speed)])
    assert both.value == pytest.approx(-0.005)
    assert both.se == pytest.approx(0.5 * math.hypot(0.006, 0.006))
    assert 4.0 < both.degrees < 19.0
    assert confirmed.joined([(0.5, Estimate(0.1, 0.0, 1.0)), (0.0, speed)]).se == 0
