import itertools
import math

import numpy as np
import pytest

from evaluator import speed
from evaluator.workload import Workload


def disturbed(random, step_s, turns=12, steps=16):
    """Steps of one true duration, a little jitter, and delays that only ever add: some last for a whole turn."""
    times = step_s * (1 + 0.01 * random.random((turns, steps)))
    times += (random.random((turns, steps)) < 0.3) * random.exponential(0.5 * step_s, (turns, steps))
    times += ((random.random(turns) < 0.4) * random.exponential(step_s, turns))[:, None]
    return times.tolist()


@pytest.mark.parametrize("ratio", [1.0, 0.95, 0.6])
def test_one_sided_delays_do_not_move_the_ratio(ratio):
    random = np.random.default_rng(1)
    found = [speed.estimate({1: disturbed(random, ratio * 2e-3)}, {1: disturbed(random, 2e-3)}) for _ in range(50)]
    errors = [timing.time_ratio / ratio - 1 for timing in found]
    assert np.abs(errors).max() < 0.01
    assert all(timing.time_per_token_ms == pytest.approx(2 * ratio, rel=0.02) for timing in found)
    assert {timing.samples for timing in found} == {192}


def test_the_standard_error_is_about_the_error():
    """Turns that drift by 2% either way, which is what resampling turns is for."""
    random = np.random.default_rng(2)

    def drifting():
        return (2e-3 * (1 + 0.02 * random.standard_normal((12, 1)) + 0.01 * random.random((12, 16)))).tolist()

    found = [speed.estimate({1: drifting()}, {1: drifting()}) for _ in range(200)]
    z = [(timing.time_ratio - 1) / timing.time_ratio_se for timing in found]
    assert 0.6 < np.sqrt(np.mean(np.square(z))) < 1.6


def test_the_standard_error_is_not_too_small_where_delays_are_large():
    random = np.random.default_rng(2)
    found = [speed.estimate({1: disturbed(random, 2e-3)}, {1: disturbed(random, 2e-3)}) for _ in range(200)]
    z = [(timing.time_ratio - 1) / timing.time_ratio_se for timing in found]
    assert np.sqrt(np.mean(np.square(z))) < 1.5


def drifting_turns(random, n):
    return (2e-3 * (1 + 0.02 * random.standard_normal((n, 1)) + 0.01 * random.random((n, 4)))).tolist()


@pytest.mark.parametrize("turns", [(3,), (4,), (5,), (7,), (5, 8)])
def test_the_error_is_that_of_new_turns_for_odd_numbers_of_turns_too(turns):
    """Of means, where it is known: over n // 2 of 5 turns they scatter 22% more than over 5 new ones, of 7 15%."""
    random = np.random.default_rng(4)
    found = []
    for _ in range(1000):
        sizes = [{size: drifting_turns(random, n) for size, n in enumerate(turns, start=1)} for _ in range(2)]
        found.append(speed.estimate(*sizes, share=1.0))
    for name in ("time_per_token_ms", "base_time_per_token_ms", "time_ratio"):
        scatter = np.std([getattr(timing, name) for timing in found])
        error = np.sqrt(np.mean([getattr(timing, f"{name}_se") ** 2 for timing in found]))
        assert error == pytest.approx(scatter, rel=0.08)


@pytest.mark.parametrize(
    ("n", "errors"),
    [
        (4, (0.018823014114530374, 0.022102862282050457, 0.017612826493204635)),
        (12, (0.016348106879592865, 0.01325436321534589, 0.011053892509737344)),
    ],
)
def test_errors_of_even_numbers_of_turns_are_what_they_were(n, errors):
    random = np.random.default_rng(n)
    candidate, baseline = (
        {1: (2e-3 * (1 + 0.02 * random.standard_normal((n, 1)) + 0.01 * random.random((n, 16)))).tolist()}
        for _ in range(2)
    )
    timing = speed.estimate(candidate, baseline)
    found = (timing.time_per_token_ms_se, timing.base_time_per_token_ms_se, timing.time_ratio_se)
    assert found == pytest.approx(errors, rel=1e-12)


def test_a_step_of_a_batch_makes_a_token_per_sequence_and_batch_sizes_are_averaged():
    candidate = {1: [[2e-3] * 4] * 3, 4: [[4e-3] * 4] * 3}
    baseline = {1: [[4e-3] * 4] * 3, 4: [[16e-3] * 4] * 3}
    timing = speed.estimate(candidate, baseline)
    assert timing.time_per_token_ms == pytest.approx((2 + 1) / 2)
    assert timing.base_time_per_token_ms == pytest.approx((4 + 4) / 2)
    assert timing.time_ratio == pytest.approx(1.5 / 4)
    assert timing.time_ratio_se == pytest.approx(0.0, abs=1e-12)
    assert timing.samples == 24


class Clock:
    """An engine whose first steps after every switch are slow."""

    def __init__(self, name, step_s, calls):
        self.name, self.step_s, self.calls = name, step_s, calls

    def decode_steps(self, batch_size, prompt_tokens, steps, seed):
        self.calls.append((self.name, batch_size, prompt_tokens, steps, seed))
        return [1.0] * speed.DISCARDED + [self.step_s] * (steps - speed.DISCARDED)


def test_engines_take_turns():
    calls, told = [], []
    workload = Workload(batch_sizes=(2,), prompt_tokens=9, decode_steps=5, turns=4, seed=7)
    timing = speed.time_in_turn(
        Clock("c", 1e-3, calls), Clock("b", 2e-3, calls), workload, lambda *progress: told.append(progress)
    )
    assert "".join(name for name, *_ in calls) == "cb" + "cbbccbbc"  # a warm-up each, then in turn
    assert {rest for _, *rest_list in calls for rest in [tuple(rest_list)]} == {(2, 9, 5 + speed.DISCARDED, 7)}
    assert timing.time_ratio == pytest.approx(0.5)
    assert timing.time_per_token_ms == pytest.approx(0.5)
    assert told == [(n, 8) for n in range(1, 9)]


class SlowAtFirst:
    """An engine that is slow for its first `turns` turns, all of a measurement, and then as fast as it can be."""

    def __init__(self, step_s, turns):
        self.step_s, self.turns = step_s, turns

    def decode_steps(self, batch_size, prompt_tokens, steps, seed):
        self.turns -= 1
        return [self.step_s * (1.2 if self.turns >= 0 else 1.0)] * steps


class Slowing:
    """An engine whose time changes from one taking of five turns to the next, by these factors."""

    def __init__(self, step_s, factors):
        self.step_s, self.factors, self.turns = step_s, factors, 0

    def decode_steps(self, batch_size, prompt_tokens, steps, seed):
        self.turns += 1
        return [self.step_s * self.factors[(self.turns - 1) // 5]] * steps


def test_a_baseline_that_is_slow_throughout_is_timed_again():
    workload = Workload(decode_steps=4, turns=4)
    misled = speed.time_in_turn(SlowAtFirst(1e-3, 0), SlowAtFirst(2e-3, 5), workload)
    assert misled.time_ratio == pytest.approx(0.5 / 1.2)
    timing = speed.time_in_turn(SlowAtFirst(1e-3, 0), SlowAtFirst(2e-3, 5), workload, expected_base_ms=2.0)
    assert timing.time_ratio == pytest.approx(0.5)
    assert timing.samples == 32
    twice = speed.time_in_turn(SlowAtFirst(1e-3, 0), Slowing(2e-3, [1.2, 1.1, 1.0]), workload, expected_base_ms=2.0)
    assert twice.time_ratio == pytest.approx(0.5)
    assert twice.samples == 48


def test_a_machine_that_has_become_slower_is_not_timed_thrice():
    workload = Workload(decode_steps=4, turns=4)
    for_ever = speed.time_in_turn(SlowAtFirst(1e-3, 0), SlowAtFirst(2e-3, 10**6), workload, expected_base_ms=2.0)
    assert for_ever.samples == 32
    slower_yet = Slowing(2e-3, [1.2, 1.3, 1.4])
    assert speed.time_in_turn(SlowAtFirst(1e-3, 0), slower_yet, workload, expected_base_ms=2.0).samples == 32


def test_a_baseline_that_is_slower_within_its_error_is_not_timed_again():
    workload = Workload(decode_steps=4, turns=8)
    quiet, noisy = Noisy(2.1e-3, 0.0001, 2), Noisy(1.9e-3, 0.4, 2)
    again = speed.time_in_turn(Noisy(1e-3, 0.0001, 1), quiet, workload, expected_base_ms=2.0)
    assert again.samples == 64
    once = speed.time_in_turn(Noisy(1e-3, 0.0001, 1), noisy, workload, expected_base_ms=1.95)
    assert once.base_time_per_token_ms > speed.SLOWER * 1.95
    assert once.samples == 32


def test_the_prediction_is_one_for_the_base_and_grows():
    assert speed.predicted_time_ratio(100, 100, 30, 30) == 1.0
    grid = [[speed.predicted_time_ratio(b, 100, n, 30) for n in (10, 20, 30)] for b in (25, 50, 100)]
    assert all(x < y for row in grid for x, y in itertools.pairwise(row))
    assert all(x < y for column in zip(*grid, strict=True) for x, y in itertools.pairwise(column))


class Noisy:
    """An engine whose turns differ by a few percent."""

    def __init__(self, step_s, spread, seed):
        self.step_s, self.spread, self.random, self.turns = step_s, spread, np.random.default_rng(seed), 0

    def decode_steps(self, batch_size, prompt_tokens, steps, seed):
        self.turns += 1
        return [self.step_s * (1 + self.spread * abs(self.random.standard_normal()))] * steps


WORKLOAD = Workload(batch_sizes=(1,), prompt_tokens=4, decode_steps=4, turns=40)


def test_timing_ends_when_its_error_is_small_enough():
    quiet = Noisy(1e-3, 0.001, 1)
    timing = speed.time_in_turn(quiet, Noisy(2e-3, 0.001, 2), WORKLOAD, enough=speed.Enough(time_ratio_se=0.006))
    assert quiet.turns == 1 + speed.ROUND
    assert timing.time_ratio == pytest.approx(0.5, abs=0.01)
    told = Noisy(1e-3, 0.8, 1)
    speed.time_in_turn(told, Noisy(2e-3, 0.8, 2), WORKLOAD, enough=speed.Enough(time_ratio_se=math.inf))
    assert told.turns == 1 + speed.ROUND
    loud = Noisy(1e-3, 0.8, 1)
    speed.time_in_turn(loud, Noisy(2e-3, 0.8, 2), WORKLOAD, enough=speed.Enough(time_ratio_se=0.0001))
    assert loud.turns == 1 + WORKLOAD.turns


def test_timing_ends_when_the_candidate_has_surely_lost():
    slow = Noisy(3e-3, 0.05, 1)
    enough = speed.Enough(time_ratio_se=0.0001, lost_above=1.1)
    speed.time_in_turn(slow, Noisy(2e-3, 0.05, 2), WORKLOAD, enough=enough)
    assert slow.turns == 1 + speed.ROUND
    close = Noisy(2.1e-3, 0.05, 1)
    speed.time_in_turn(close, Noisy(2e-3, 0.05, 2), WORKLOAD, enough=enough)
    assert close.turns == 1 + WORKLOAD.turns


class BySize:
    """An engine whose steps take two milliseconds, with a spread for each batch size; it counts turns by batch size."""

    def __init__(self, spreads, seed):
        self.spreads, self.turns = spreads, dict.fromkeys(spreads, 0)
        self.random = np.random.default_rng(seed)

    def decode_steps(self, batch_size, prompt_tokens, steps, seed):
        self.turns[batch_size] += 1
        return [2e-3 * (1 + self.spreads[batch_size] * abs(self.random.standard_normal()))] * steps


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("spreads", "least"),
    [
        ({1: 0.03, 32: 0.2}, {32}),  # a step of 32 is seven times as uncertain, and counts for a thirty-second
        ({1: 0.0005, 32: 0.6}, {1}),  # and here it is what the error comes from
        ({1: 0.1, 2: 0.1}, set()),
    ],
)
def test_later_rounds_leave_out_the_batch_sizes_that_make_up_little_of_the_error(spreads, least, several):
    workload = Workload(batch_sizes=tuple(spreads), prompt_tokens=4, decode_steps=4, turns=24)
    engine, baseline = BySize(spreads, 1), BySize(spreads, 2)
    if several:
        timing = speed.estimate(*speed.turns_of([engine, BySize(spreads, 3)], baseline, workload, 1e-6)[0])
    else:
        timing = speed.time_in_turn(engine, baseline, workload, enough=speed.Enough(time_ratio_se=1e-6))
    assert engine.turns == {size: 1 + (speed.ROUND if size in least else workload.turns) for size in spreads}
    assert baseline.turns == engine.turns
    assert timing.samples == sum(engine.turns[size] - 1 for size in spreads) * workload.decode_steps
    assert timing.time_ratio == pytest.approx(1.0, abs=5 * timing.time_ratio_se)


def test_without_a_wanted_error_all_turns_are_taken():
    quiet = Noisy(1e-3, 0.001, 1)
    speed.time_in_turn(quiet, Noisy(2e-3, 0.001, 2), WORKLOAD)
    assert quiet.turns == 1 + WORKLOAD.turns


def test_several_candidates_are_timed_in_turn_with_one_baseline():
    calls = []
    workload = Workload(batch_sizes=(1, 4), prompt_tokens=9, decode_steps=5, turns=4)
    engines = [Clock("a", 1e-3, calls), Clock("b", 3e-3, calls)]
    timings = speed.time_all(engines, Clock("0", 2e-3, calls), workload, 0.01)
    assert [{size: timing.time_ratio for size, timing in each.items()} for each in timings] == [
        {1: pytest.approx(0.5), 4: pytest.approx(0.5)},
        {1: pytest.approx(1.5), 4: pytest.approx(1.5)},
    ]
    assert "".join(name for name, *_ in calls) == 2 * ("0ab" + "0ab" + "ab0" + "b0a" + "0ab")


def test_the_progress_of_several_candidates_counts_turns_and_ends_where_timing_ends():
    """One is exact after a round of eight and takes no further turn; the other takes all sixteen."""
    told = []
    workload = Workload(batch_sizes=(1,), prompt_tokens=9, decode_steps=5, turns=16)
    engines = [Noisy(1e-3, 0.0005, 1), Noisy(1e-3, 0.3, 2)]
    speed.time_all(engines, Noisy(2e-3, 0.0005, 3), workload, 0.01, lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == list(range(1, 3 * 8 + 2 * 8 + 1))
    assert [total for _, total in told] == [3 * 16] * 24 + [3 * 8 + 2 * 8] * 16


class Warm:
    """An engine that is 1% faster when the turn before was its own."""

    def __init__(self, last):
        self.last = last

    def decode_steps(self, batch_size, prompt_tokens, steps, seed):
        warm, self.last[:] = self.last == [self], [self]
        return [0.99e-3 if warm else 1e-3] * steps


@pytest.mark.parametrize("candidates", [1, 2, 3, 4])
def test_no_engine_gains_by_its_place_in_the_order(candidates):
    last = []
    workload = Workload(batch_sizes=(1,), prompt_tokens=9, decode_steps=5, turns=16)
    timings = speed.time_all([Warm(last) for _ in range(candidates)], Warm(last), workload, 1e-9)
    assert [timing[1].time_ratio for timing in timings] == [pytest.approx(1.0, abs=1e-4)] * candidates
