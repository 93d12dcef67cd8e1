"""The vLLM engine for real: `make test-vllm` on a CPU."""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from evaluator import backends, batch, embedded_texts, measure, quality, speed, texts
from evaluator.errors import EngineCrashed, RequestRefused
from evaluator.generation import Limits
from evaluator.workload import Workload

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(backends.unavailable("vllm") is not None, reason=str(backends.unavailable("vllm"))),
]

EXAONE = os.environ.get("OPTUNA_SEARCH_EXAONE4")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    """In bfloat16: EXAONE-4.0 if there is one, else the tiny model."""
    if EXAONE:
        return Path(EXAONE)
    path = tmp_path_factory.mktemp("bfloat16") / "model"
    transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def windows(checkpoint, shards):
    if not EXAONE:
        return [window for shard in shards for window in shard]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return texts.windows(tokenizer, embedded_texts.documents(), 128, 8)


def test_vllm_agrees_with_transformers(checkpoint, windows, start):
    settings = {"device": DEVICE, "backend": "vllm", "batch_sizes": (1, 3), "threads": None}
    first = start(checkpoint, **settings)
    second = start(checkpoint, **settings)
    assert second.seconds["warm"] == 0.0  # and so was the first's, where another test has begun vLLM before

    exact = start(checkpoint)
    ours, theirs = first.nll(windows), exact.nll(windows)
    assert [len(window) for window in ours] == [len(window) - 1 for window in windows]
    perplexity = [quality.perplexity(sum(map(sum, nll)) / sum(map(len, nll))) for nll in (ours, theirs)]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=0.01)  # bfloat16 against float32

    for batch_size in (1, 3):
        seconds = first.decode_steps(batch_size, 16, 12, 0)
        assert len(seconds) == 12
        assert all(0 < s < 30 for s in seconds)
    assert first.logits_sha256(windows[0]) == second.logits_sha256(windows[0])

    with pytest.raises(EngineCrashed, match="needs a max_model_len of"):
        first.decode_steps(1, 252, 12, 0)
    assert not first.alive
    first = start(checkpoint, **settings)

    workload = Workload(batch_sizes=(1, 3), prompt_tokens=16, decode_steps=8, turns=2)
    request = measure.Request([[window] for window in windows], workload)
    measured = measure.measure_candidate(checkpoint, second, request, first)
    assert measured.perplexity == pytest.approx(perplexity[0], rel=0.01)
    assert measured.engine_version.startswith("vllm ")
    assert measured.dtype == "bfloat16"
    # how fast is not judged here: on a CPU vLLM's threads spin, and other work on the same cores slows it manyfold
    assert measured.timing_samples == 2 * 2 * 8
    assert measured.time_ratio > 0


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's kernels don't compute in exact float32")
def test_vllm_generates_what_transformers_does(write_pico_model, tmp_path, start):
    """In float32: more prompts than run at once, stop texts, ends of sequence, and timing as before afterwards."""
    path = write_pico_model(tmp_path / "model", "llama", dtype="float32", head_dim=32)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 320) for _ in range(draw.randrange(1, 60))] for _ in range(32)]
    settings = {"device": DEVICE, "max_model_len": 128, "threads": None}
    served = {"max_num_seqs": 12, "kv_tokens": 700, "arguments": {"dtype": "float32"}}
    ours = start(path, backend="vllm", **settings, **served)
    exact = start(path, **settings)
    limits = [Limits(max_tokens=draw.randrange(1, 24), ignore_eos=True) for _ in prompts]
    answers, expected = ours.generate(prompts, limits), exact.generate(prompts, limits)
    assert [(a.tokens, a.text, a.finish) for a in answers] == [(a.tokens, a.text, a.finish) for a in expected]
    assert [len(answer.tokens) for answer in answers] == [its.max_tokens for its in limits]
    assert all(0 <= a.submitted_s <= a.first_token_s <= a.last_token_s for a in answers)
    assert max(a.first_token_s for a in answers) > min(a.last_token_s for a in answers)  # 12 at once

    text = next(a.text for a in answers if len(a.text) > 6 and "\ufffd" not in a.text[3:6])
    stopping = Limits(max_tokens=20, stop=(text[3:6],))
    answers, expected = ours.generate(prompts, stopping), exact.generate(prompts, stopping)
    assert [(a.tokens, a.text, a.finish) for a in answers] == [(a.tokens, a.text, a.finish) for a in expected]
    assert "stop" in {answer.finish for answer in answers}

    drawn = Limits(max_tokens=8, temperature=1.0, seed=5)
    assert [a.tokens for a in ours.generate(prompts, drawn)] == [a.tokens for a in ours.generate(prompts, drawn)]
    assert len(ours.decode_steps(1, 16, 8, 0)) == 8
    with pytest.raises(RequestRefused, match="takes 160 tokens, and max_model_len is 128"):
        ours.generate([[5] * 100], Limits(max_tokens=60))
    assert ours.alive


def test_prompts_that_fill_more_than_a_step_are_sampled_by_their_own_seeds(write_pico_model, tmp_path, start):
    path = write_pico_model(tmp_path / "model", "llama", dtype="float32", head_dim=32)
    served = {"max_num_seqs": 64, "arguments": {"dtype": "float32"}}
    engine = start(path, backend="vllm", device=DEVICE, max_model_len=128, threads=None, **served)
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 320) for _ in range(100)] for _ in range(64)]  # 6,400 tokens, and a step holds 2,048
    limits = [Limits(max_tokens=6, temperature=1.0, seed=place, ignore_eos=True) for place in range(64)]
    answers = engine.generate(prompts, limits)
    assert len({answer.tokens for answer in answers}) > 50
    for place in (0, 20, 63):
        (alone,) = engine.generate(prompts[place : place + 1], limits[place])
        assert alone.tokens == answers[place].tokens


def test_vllm_times_whole_requests_of_a_config_alone(write_pico_model, tmp_path, start):
    """Random weights and no tokenizer, as for a speed table, in turn with a model that is whole."""
    path = write_pico_model(tmp_path / "model", "llama", head_dim=32)
    (tmp_path / "config").mkdir()
    shutil.copy(path / "config.json", tmp_path / "config")
    workload = Workload(kind="batch", requests=12, input_tokens=(5, 60), output_tokens=(4, 20), max_num_seqs=8, turns=4)
    workload = batch.with_requests(workload, 320)
    settings = {"device": DEVICE, "backend": "vllm", "max_model_len": 80, "threads": None}
    needs = {"max_num_seqs": 8, "kv_tokens": batch.kv_tokens(workload)}
    whole = start(path, **settings, **needs)
    hollow = start(tmp_path / "config", random_weights=True, **settings, **needs)
    (timings,) = speed.time_all([hollow], whole, workload, 0.01)
    assert timings[8].samples == 4
    assert timings[8].time_ratio > 0  # how fast is not judged here, see above
    answers = hollow.generate([[5, 6]], Limits(max_tokens=7, ignore_eos=True))
    assert (len(answers[0].tokens), answers[0].text) == (7, "")
