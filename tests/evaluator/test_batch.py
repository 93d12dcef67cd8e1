"""Whole requests as a workload: which are given, what a token takes, and how two models compare."""

import dataclasses
import json

import numpy as np
import pytest

from evaluator import batch, measure, speed
from evaluator.generation import Answer
from evaluator.measurement import Measurement
from evaluator.workload import Workload

WORKLOAD = Workload(
    kind="batch", requests=40, input_tokens=(5, 30), output_tokens=(3, 9), max_num_seqs=16, seed=1, turns=4
)
QUICK = Workload(kind="batch", requests=6, input_tokens=(4, 20), output_tokens=(4, 8), max_num_seqs=4, turns=12)


def given(workload, prompts=()):
    return batch.with_requests(workload, 160, prompts)


# -- the requests --------------------------------------------------------------------------------------------


def test_lengths_are_drawn_between_their_ends_with_the_seed():
    asked = given(WORKLOAD).asked
    assert {len(one.prompt) for one in asked} <= set(range(5, 31))
    assert {one.limits.max_tokens for one in asked} == set(range(3, 10))  # both ends too
    assert all(one.limits.ignore_eos and 0 <= min(one.prompt) <= max(one.prompt) < 160 for one in asked)
    assert given(WORKLOAD).asked == asked
    assert given(dataclasses.replace(WORKLOAD, seed=2)).asked != asked
    wide = given(dataclasses.replace(WORKLOAD, input_tokens=(7, 7), output_tokens=(5, 5))).asked
    assert {(len(one.prompt), one.limits.max_tokens) for one in wide} == {(7, 5)}


def test_prompts_of_a_file_get_the_same_lengths_of_answers_and_may_end_by_themselves():
    prompts = [[place, 7] for place in range(60)]
    asked = given(WORKLOAD, prompts).asked
    assert [one.prompt for one in asked] == [(place, 7) for place in range(40)]
    assert [one.limits for one in asked] == [one.limits for one in given(WORKLOAD).asked]
    free = given(dataclasses.replace(WORKLOAD, ignore_eos=False), prompts)
    assert {(one.limits.max_tokens, one.limits.ignore_eos) for one in free.asked} == {(9, False)}
    fixed = batch.of_fixed_lengths(free)
    assert fixed.asked == asked
    assert fixed.ignore_eos


def test_memory_is_for_the_longest_that_run_together():
    workload = given(WORKLOAD)
    sizes = sorted(len(one.prompt) + one.limits.max_tokens for one in workload.asked)
    assert batch.longest(workload) == sizes[-1]
    assert workload.sizes == (16,)
    assert batch.kv_tokens(workload) == sum(sizes[-16:])
    few = given(dataclasses.replace(WORKLOAD, requests=3))
    assert few.sizes == (3,)
    assert batch.kv_tokens(few) == sum(one.most_tokens for one in few.asked)


def test_a_workload_is_kept_with_the_keys_of_its_kind_and_without_its_requests():
    decode = Workload(batch_sizes=(1, 4), turns=9)
    assert decode.to_dict() == {
        "batch_sizes": [1, 4], "prompt_tokens": 64, "decode_steps": 16, "turns": 9, "seed": 0,
    }  # fmt: skip
    assert list(WORKLOAD.to_dict()) == [
        *("kind", "requests", "input_tokens", "output_tokens", "ignore_eos", "max_num_seqs", "turns", "seed")
    ]
    for workload in (decode, given(WORKLOAD)):
        assert Workload.from_dict(json.loads(json.dumps(workload.to_dict()))) == workload


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "served"}, {"requests": 0}, {"max_num_seqs": 0}, {"input_tokens": (9, 3)}, {"output_tokens": (0, 3)}],
)
def test_a_batch_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="workload: "):
        dataclasses.replace(WORKLOAD, **wrong)


# -- the time ------------------------------------------------------------------------------------------------


def test_a_tokens_time_is_that_of_all_requests_over_all_generated_tokens():
    answers = [
        Answer((1, 2, 3), "", "length", submitted_s=0.5, first_token_s=1.0, last_token_s=2.0),
        Answer((1,), "", "stop", submitted_s=0.6, first_token_s=1.5, last_token_s=4.5),  # and its end of sequence
        Answer((), "", "stop", submitted_s=0.7, first_token_s=0.9, last_token_s=0.9),
    ]
    assert batch.seconds_per_token(answers) == pytest.approx((4.5 - 0.5) / (3 + 2 + 1))


class Clock:
    """An engine that takes its times for a token in turn, and notes its calls."""

    def __init__(self, name, seconds, calls):
        self.name, self.seconds, self.calls, self.runs = name, seconds, calls, 0

    def generate(self, prompts, limits):
        self.calls.append(self.name)
        tokens = sum(its.max_tokens for its in limits)
        took = tokens * self.seconds[self.runs % len(self.seconds)]
        self.runs += 1
        return [Answer((1,) * its.max_tokens, "", "length", 0.0, 0.0, took) for its in limits]


def test_runs_take_turns_and_the_fastest_quarter_counts():
    calls = []
    candidate = Clock("c", [9.0, 1.0, 5.0, 2.0, 3.0, 9.0, 4.0, 6.0, 8.0], calls)
    workload = given(dataclasses.replace(WORKLOAD, turns=8))
    timing = speed.time_in_turn(candidate, Clock("b", [3.0], calls), workload)
    assert "".join(calls) == "cb" + "cbbc" * 4  # a run each that does not count, then in turn
    assert timing.time_per_token_ms == pytest.approx(1e3 * (1.0 + 2.0) / 2)
    assert timing.base_time_per_token_ms == pytest.approx(3e3)
    assert timing.time_ratio == pytest.approx(0.5)
    assert timing.samples == 8


def test_runs_end_when_their_error_is_small_enough():
    calls = []
    workload = given(dataclasses.replace(WORKLOAD, turns=40))
    noise = np.random.default_rng(0).uniform(1.0, 1.001, 97)
    enough = speed.Enough(time_ratio_se=0.01)
    timing = speed.time_in_turn(Clock("c", noise, calls), Clock("b", 2 * noise[::-1], calls), workload, enough=enough)
    assert timing.samples == speed.ROUND
    assert timing.time_ratio == pytest.approx(0.5, rel=0.002)
    timings = speed.time_all([Clock("c", noise, calls)], Clock("b", 2 * noise[::-1], calls), workload, 0.01)
    assert timings[0][16].time_ratio == pytest.approx(0.5, rel=0.002)
    assert timings[0][16].base_time_per_token_ms == pytest.approx(2e3, rel=0.002)


TRIES = 4  # other tests of this machine come and go


@pytest.mark.long
def test_one_model_takes_the_time_of_itself_and_one_of_fewer_layers_less(tmp_path, start, shards, write_tiny_model):
    deep, shallow = (write_tiny_model(tmp_path / str(layers), layers=layers) for layers in (8, 3))
    baseline, twin, candidate = start(deep), start(deep), start(shallow)
    workload = given(QUICK)
    alike = (speed.time_in_turn(twin, baseline, workload).time_ratio for _ in range(TRIES))
    assert any(ratio == pytest.approx(1.0, abs=0.2) for ratio in alike)  # 0.02 on an idle machine
    request = measure.Request(shards, workload)
    measured = measure.measure_candidate(shallow, candidate, request, baseline)
    assert measured.time_ratio < 0.8
    assert measured.base_time_per_token_ms > measured.time_per_token_ms
    assert measured.timing_samples == 12
    assert measured.workload.asked == ()
    assert Measurement.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
    base = measure.measure_base(deep, baseline, request)
    assert base.time_ratio == 1.0
    assert base.base_time_per_token_ms == base.time_per_token_ms > 0
