import hashlib
import json
import math
import os
import types
from pathlib import Path

import pytest
import torch
import transformers

from evaluator import checkpoint_files, embedded_texts, measure, texts
from evaluator.errors import EvaluationError, NotFinite
from evaluator.gpu_state import GpuRecord, GpuState, OtherProcess
from evaluator.measure import Request
from evaluator.measurement import Measurement
from evaluator.score import Formula, score_of
from evaluator.tasks import TaskResult
from evaluator.workload import Workload

QUICK = Workload(batch_sizes=(1, 2), prompt_tokens=4, decode_steps=3, turns=2)


def untimed(shards, tasks=()):
    return Request(shards, QUICK, tasks, timed=False)


def plain_perplexity(model, windows):
    """Shares no code with what is tested: growing prefixes, float64."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for window in windows:
            for t in range(1, len(window)):
                logits = model(torch.tensor([window[:t]])).logits[0, -1].double()
                total += float(logits.logsumexp(0) - logits[window[t]])
                tokens += 1
    return math.exp(total / tokens), tokens


def test_perplexity_is_that_of_a_plain_loop(tiny, tiny_model, engine, shards):
    found = measure.measure_base(tiny, engine, untimed(shards))
    perplexity, tokens = plain_perplexity(tiny_model, [window for shard in shards for window in shard])
    assert found.perplexity == pytest.approx(perplexity, rel=1e-3)
    assert found.tokens == tokens
    assert math.fsum(found.shard_nll) / 4 == pytest.approx(found.nll_nats_per_token)


def test_a_measurement_holds_what_the_checkpoint_and_the_engine_say(tiny, tiny_model, engine, shards):
    said = []
    found = measure.measure_base(tiny, engine, Request(shards, QUICK), progress=said.append)
    assert found.time_ratio == 1.0
    assert found.time_per_token_ms == found.base_time_per_token_ms > 0
    assert found.tokens_per_sec == pytest.approx(1e3 / found.time_per_token_ms)
    assert found.total_parameters == sum(p.numel() for p in tiny_model.parameters())
    assert (found.number_of_layers, found.number_of_heads, found.hidden_dim) == (2, 4, 64)
    assert found.weights_sha256 == hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    assert found.model_size_mb == (tiny / "model.safetensors").stat().st_size / 1e6
    assert found.text_digest == texts.text_digest([window for shard in shards for window in shard])
    assert {"start", "load", "time", "nll", "digest"} <= set(found.seconds)
    assert Measurement.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found
    assert score_of(found, found).score == 0.5
    assert "timing, turn 8 of 8" in said
    assert said[-1] == "digests"


def test_the_state_of_the_gpu_is_kept_and_older_files_have_none(tiny, engine, shards):
    found = measure.measure_base(tiny, engine, untimed(shards))
    assert found.gpu is None
    assert "gpu" not in found.to_dict()  # as files were before
    hot = GpuState(sm_clock_mhz=1200, sm_clock_max_mhz=1980, throttle_reasons=("hw_slowdown",))
    others = (OtherProcess(7, "python", 12.5),)
    seen = GpuRecord(GpuState(others=None), hot, 4, 4, ("hw_slowdown",), 1200, others, taken_again=2)
    watched = measure._watched(found, seen)
    assert watched.notes == (*found.notes, *seen.warnings)
    assert len(seen.warnings) == 2
    values = json.loads(json.dumps(watched.to_dict(), allow_nan=False))
    assert values == watched.to_dict()  # a study's attribute is compared with it
    assert Measurement.from_dict(values) == watched
    assert Measurement.from_dict(found.to_dict()) == found


def test_a_candidate_is_timed_against_the_baseline(tiny, engine, start, shards):
    found = measure.measure_candidate(tiny, start(), Request(shards, QUICK), engine, weights_sha256="known")
    assert found.weights_sha256 == "known"
    assert found.timing_samples == 2 * 2 * 3
    assert found.time_ratio == pytest.approx(found.time_per_token_ms / found.base_time_per_token_ms)


def test_a_candidate_that_is_timed_needs_the_baseline(tiny, engine, shards):
    with pytest.raises(ValueError, match="timed against the baseline's engine"):
        measure.measure_candidate(tiny, engine, Request(shards, QUICK), None)


def test_an_untimed_candidate_needs_no_baseline(tiny, engine, shards):
    found = measure.measure_candidate(tiny, engine, untimed(shards), None, weights_sha256="known")
    assert (found.time_ratio, found.timing_samples, found.weights_sha256) == (1.0, 0, "known")
    assert any("nothing was timed" in note for note in found.notes)
    assert "time" not in found.seconds


def test_the_loss_is_over_tokens_and_its_error_over_shards():
    found = measure.loss_of([[1.0, 2.0, 3.0], [4.0]])
    assert (found.nll, found.tokens, found.shard_nll) == (2.5, 4, (2.0, 4.0))
    assert found.se == pytest.approx(1.0)
    assert found.perplexity == pytest.approx(math.exp(2.5))
    assert measure.loss_of([[1e5]]).perplexity == math.inf


def test_another_timing_can_be_put_in(tiny, engine, shards):
    found = measure.measure_base(tiny, engine, untimed(shards))
    assert found.timing_samples == 0
    assert any("nothing was timed" in note for note in found.notes)
    timing = measure.Timing(0.5, 0.0, 1.0, 0.0, 0.5, 0.0, samples=0)
    assert measure.with_timing(found, timing).tokens_per_sec == 2000.0


def test_a_loss_without_a_finite_perplexity_is_refused(tiny, shards):
    class Confident:
        seconds = types.MappingProxyType({"start": 0.0})

        def nll(self, windows):
            return [[1e5] * (len(window) - 1) for window in windows]

    with pytest.raises(NotFinite, match="no finite perplexity"):
        measure.measure_base(tiny, Confident(), untimed(shards))


class Asked:
    """A task that finds a window right where its first loss exceeds its second: it sees the engine's own numbers."""

    digest = "d"
    longest = 24

    def __init__(self, name, windows):
        self.name, self.windows = name, windows

    def run(self, engine, progress=None):
        progress(f"{self.name} runs")
        correct = tuple(float(nll[0] > nll[1]) for nll in engine.nll(self.windows))
        return TaskResult(sum(correct) / len(correct), 0.0, len(correct), correct, self.digest)


def test_tasks_run_after_the_perplexity(tiny, engine, shards):
    said = []
    windows = [window for shard in shards for window in shard]
    asked = [Asked("one", windows), Asked("two", windows[:3])]
    found = measure.measure_base(tiny, engine, untimed(shards, asked), progress=said.append)
    assert said == [
        *(f"quality, shard {i} of 4" for i in (1, 2, 3, 4)),
        "task one",
        "one runs",
        "task two",
        "two runs",
        "digests",
    ]
    assert list(found.tasks) == ["one", "two"]
    assert found.tasks["one"].correct == tuple(float(nll[0] > nll[1]) for nll in engine.nll(windows))
    assert found.tasks["two"].items == 3
    assert found.seconds["tasks"] >= 0
    assert Measurement.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found
    assert 0 < found.tasks["one"].value < 1
    assert score_of(found, found, Formula(perf=(("one", 1.0),))).perf_norm == 1.0


def test_without_tasks_a_measurement_says_nothing_of_them(tiny, engine, shards):
    found = measure.measure_base(tiny, engine, untimed(shards))
    assert found.tasks == {}
    assert "tasks" not in found.seconds


@pytest.mark.parametrize("names", [["a", "a"], ["perplexity"]])
def test_tasks_have_names_of_their_own(shards, names):
    with pytest.raises(EvaluationError, match="a name of its own"):
        Request(shards, QUICK, [Asked(name, shards[0]) for name in names])


def write_safetensors(path, shapes, name="model.safetensors"):
    path.mkdir(exist_ok=True)
    header = {name: {"dtype": "I32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    data = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (path / name).write_bytes(len(data).to_bytes(8, "little") + data)


def test_parameters_are_those_of_the_dequantized_model(tmp_path):
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 64, "tie_word_embeddings": True}
    quantization = {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
    write_safetensors(
        tmp_path / "m",
        {
            "model.embed_tokens.weight": [10, 64],
            "lm_head.weight": [10, 64],
            "q.weight_packed": [32, 8],
            "q.weight_scale": [32, 2],
            "q.weight_shape": [2],
            "norm.weight": [64],
        },
    )
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    assert checkpoint_files.describe(tmp_path / "m").parameters == 10 * 64 + 32 * 64 + 64


@pytest.mark.parametrize("targets", ["lm_head", r"re:lm_.*"])
def test_a_head_in_8_bits_counts_once_beside_layers_in_4_and_scales_of_the_cache_not_at_all(tmp_path, targets):
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 64, "tie_word_embeddings": False}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}},
        "group_1": {"targets": [targets], "weights": {"num_bits": 8}},
    }
    shapes = {
        "model.embed_tokens.weight": [10, 64],
        "lm_head.weight_packed": [10, 16],
        "lm_head.weight_scale": [10, 1],
        "lm_head.weight_shape": [2],
        "model.layers.0.self_attn.q_proj.weight_packed": [32, 8],
        "model.layers.0.self_attn.q_proj.weight_scale": [32, 2],
        "model.layers.0.self_attn.q_proj.weight_shape": [2],
        "model.layers.0.self_attn.k_scale": [1],
        "model.layers.0.self_attn.v_scale": [1],
    }
    write_safetensors(tmp_path, shapes)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"config_groups": groups}}))
    assert checkpoint_files.describe(tmp_path).parameters == 10 * 64 + 10 * 64 + 32 * 64


def test_a_checkpoints_weights_are_one_file_or_what_its_index_names(tmp_path):
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 4}
    model = tmp_path / "model"
    write_safetensors(model, {"b": [3]}, "b.safetensors")
    write_safetensors(model, {"a": [2]}, "a.safetensors")
    write_safetensors(model, {"stray": [100]}, "model-00001-of-00001.safetensors")
    write_safetensors(tmp_path, {"outside": [50]}, "outside.safetensors")
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(EvaluationError, match="has no weights"):
        checkpoint_files.describe(model)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "b.safetensors", "a": "a.safetensors"}}))
    shards = [model / "a.safetensors", model / "b.safetensors"]
    assert checkpoint_files.weight_files(model) == shards
    assert checkpoint_files.describe(model).parameters == 5
    assert checkpoint_files.describe(model).bytes == sum(shard.stat().st_size for shard in shards)
    joined = b"".join(shard.read_bytes() for shard in shards)
    assert checkpoint_files.weights_sha256_of(model) == hashlib.sha256(joined).hexdigest()
    for name, says in (("../outside.safetensors", "not directly in the model's directory"), ("c", "missing: c")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(EvaluationError, match=says):
            checkpoint_files.weights_sha256_of(model)
    write_safetensors(model, {"whole": [7]})
    assert checkpoint_files.describe(model).parameters == 7


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_refused(tiny, tmp_path, damage):
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    (tmp_path / damage).write_bytes(b"\xff" * 9)
    with pytest.raises(EvaluationError, match="not a readable checkpoint"):
        checkpoint_files.describe(tmp_path)
    (tmp_path / damage).unlink()
    with pytest.raises(EvaluationError):
        checkpoint_files.describe(tmp_path)


EXAONE = os.environ.get("OPTUNA_SEARCH_EXAONE4")


@pytest.mark.skipif(not EXAONE, reason="OPTUNA_SEARCH_EXAONE4 names no EXAONE-4.0 checkpoint")
def test_exaone4_in_bfloat16_is_computed_in_float32(start):
    path = Path(EXAONE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    windows = texts.windows(tokenizer, embedded_texts.documents(), 48, 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = measure.measure_base(path, start(path), Request([[window] for window in windows], QUICK))
    assert found.perplexity == pytest.approx(plain_perplexity(model, windows)[0], rel=1e-3)
    assert found.total_parameters == sum(p.numel() for p in model.parameters())
