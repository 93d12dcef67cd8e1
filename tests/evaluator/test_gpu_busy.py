"""The GPU's busy time: the union of intervals, and a real profile where there is a GPU."""

import random

import pytest
import torch

from evaluator import gpu_busy, measure
from evaluator.gpu_busy import busy_us, union
from evaluator.workload import Workload


def test_the_union_counts_what_overlaps_once():
    assert union([]) == 0.0
    assert union([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)]) == 4.0
    assert union([(5.0, 6.0), (0.0, 10.0), (1.0, 2.0), (9.5, 10.0)]) == 10.0
    assert union([(0.0, 1.0), (1.0, 2.0)]) == 2.0


def test_the_union_is_that_of_a_plain_count():
    drawn = random.Random(1)
    for _ in range(50):
        intervals = [(start, start + drawn.randint(0, 9)) for start in (drawn.randint(-20, 60) for _ in range(30))]
        covered = {tick for start, end in intervals for tick in range(start, end)}
        assert union(intervals) == len(covered)


def test_kernels_and_copies_are_busy_and_launches_and_annotations_are_not():
    def event(cat, ts, dur, ph="X"):
        return {"ph": ph, "cat": cat, "ts": ts, "dur": dur, "name": cat}

    trace = {
        "traceEvents": [
            event("kernel", 100, 10),
            event("kernel", 105, 10),
            event("gpu_memcpy", 120, 2.5),
            event("gpu_memset", 130, 1),
            event("cuda_runtime", 0, 900),
            event("gpu_user_annotation", 0, 900),
            event("cpu_op", 0, 900),
            {"ph": "M", "name": "process_name"},
            {"ph": "f", "cat": "kernel", "ts": 1},
        ]
    }
    assert busy_us(trace) == 15 + 2.5 + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_known(start):
    assert gpu_busy.busy_ms(lambda: pytest.fail("nothing is run"), 4) is None
    assert gpu_busy.bytes_per_s() is None
    engine = start()
    assert engine.busy_ms(1, 4, 4, 0) is None
    assert engine.bytes_per_s() is None
    assert "gpu" not in engine.facts()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_a_gpu_is_busy_for_less_than_the_wall_time_and_for_more_than_reading_weights(backend, start, tiny, shards):
    if backend == "vllm":
        pytest.importorskip("vllm")
    engine = start(backend=backend, device="cuda", threads=None)
    request = measure.Request(shards, Workload(prompt_tokens=4, decode_steps=16, turns=4))
    measured = measure.measure_base(tiny, engine, request)
    assert measured.gpu is None or measured.gpu.reads > 0
    rate = engine.bytes_per_s()
    assert rate > 1e10
    busy = engine.busy_ms(1, 4, 16, 0)
    floor = 1e3 * measured.model_size_mb * 1e6 / 2 / rate  # vLLM serves float32 in 16 bits
    assert floor / 2 <= busy <= 1.1 * measured.time_per_token_ms
    assert engine.nll(shards[0])  # it can still be used
