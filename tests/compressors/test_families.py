"""Test what is particular to one family: the gaps of its config.json, what is refused, and what vLLM computes."""

import dataclasses
import functools
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from compressors import build
from compressors.errors import CheckpointError
from compressors.methods import depth, heads, hidden
from compressors.model import family
from compressors.model.checkpoint import Checkpoint, stock_config
from compressors.plan import CompressionPlan
from compressors.statistics import activations, second_moments
from evaluator import backends
from evaluator.process import EngineProcess

F32 = torch.float32


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, 320, (3, 40), generator=torch.Generator().manual_seed(1)).tolist()


def logits(model, windows):
    with torch.inference_mode():
        return model(torch.tensor(windows), use_cache=False).logits


def edit_config(path, *dropped, **changes):
    config = json.loads((path / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in dropped}
    (path / "config.json").write_text(json.dumps({**kept, **changes}))


def read(path):
    checkpoint = Checkpoint.read(path)
    return checkpoint, family.family_of(checkpoint)


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "dropped", "changes", "said"),
    [
        ("llama", (), {"qkv_bias": True}, "qkv_bias is true"),
        ("llama", (), {"is_causal": False}, "is_causal is false"),
        ("llama", (), {"logit_scale": 0.5}, "logit_scale is 0.5"),
        ("qwen2", (), {"use_sliding_window": True, "max_window_layers": 3}, "use_sliding_window is true"),
        ("qwen2", (), {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config is {"),
        (
            "qwen2",
            ("num_key_value_heads",),
            {},
            "lacks num_key_value_heads, and transformers takes 32 for qwen2, not 6",
        ),
        ("qwen2", (), {"head_dim": 16}, "head_dim is 16, but vLLM takes hidden_size / num_attention_heads = 144 / 6"),
        ("qwen3", (), {"attention_bias": True}, "attention_bias is true"),
        ("qwen3", (), {"use_sliding_window": True}, "use_sliding_window is true"),
        ("qwen3", ("head_dim",), {}, "lacks head_dim, and transformers takes 128 for qwen3, not 16"),
        ("smollm3", (), {"attention_bias": True}, "attention_bias is true"),
        ("smollm3", (), {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window is true"),
        ("gemma3_text", (), {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("gemma3_text", (), {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3_text", (), {"hidden_activation": "gelu"}, 'hidden_activation is "gelu"'),
        ("gemma3_text", (), {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("gemma3_text", ("head_dim",), {}, "lacks head_dim, and transformers takes 256 for gemma3_text, not 16"),
    ],
)
def test_keys_that_would_change_the_architecture_are_refused_by_name(
    tmp_path, write_pico_model, model_type, dropped, changes, said
):
    path = write_pico_model(tmp_path / "m", model_type)
    edit_config(path, *dropped, **changes)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_that_need_their_own_code_are_refused_with_that_reason(pico_llama, tmp_path):
    config = {
        "architectures": ["ElsewhereForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_elsewhere.ElsewhereConfig"},
        "model_type": "elsewhere",
        "hidden_size": 96,
        "num_layers": 5,
        "num_attention_heads": 6,
        "intermediate_size": 160,
        "vocab_size": 320,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = "stock transformers has no elsewhere; it needs its own code, and a model's code is never run"
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.read(tmp_path)
    base = Checkpoint.read(pico_llama)
    with pytest.raises(CheckpointError, match=said):
        family.family_of(dataclasses.replace(base, config={**config, "num_hidden_layers": 5}))


def test_a_model_that_reads_images_is_refused_with_that_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {"hidden_size": 96}}))
    with pytest.raises(CheckpointError, match="a gemma3 model has its language model inside"):
        Checkpoint.read(tmp_path)


# -- what config.json leaves open ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "rule", "dropped", "key", "own", "kept"),
    [
        (
            "gemma3_text",
            {"sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
            ("layer_types", "rope_parameters", "_sliding_window_pattern", "tie_word_embeddings"),
            "layer_types",
            ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            ["sliding_attention", "sliding_attention", "full_attention"],
        ),
        (
            "smollm3",
            {"no_rope_layer_interval": 2},
            ("no_rope_layers", "layer_types", "tie_word_embeddings"),
            "no_rope_layers",
            [1, 0, 1, 0, 1],
            [1, 1, 0],
        ),
    ],
)
def test_a_depth_cut_keeps_each_layers_type_also_if_a_rule_derives_it(
    tmp_path, write_pico_model, windows, model_type, rule, dropped, key, own, kept
):
    """Gemma's config on the hub has a rule that counts from the first layer, and no list."""
    path = write_pico_model(tmp_path / "m", model_type)
    edit_config(path, *dropped, **rule)
    base, its_family = read(path)
    assert getattr(stock_config(base.config), key) == own
    cut = depth.cut(base, its_family, (0, 2, 3))
    assert cut.config[key] == kept
    whole = base.to_model("cpu", F32)
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[index] for index in (0, 2, 3))
    whole.config.num_hidden_layers = 3
    whole.config.layer_types = [whole.config.layer_types[index] for index in (0, 2, 3)]
    assert torch.equal(logits(cut.to_model("cpu", F32), windows), logits(whole, windows))


def test_a_head_that_is_tied_by_default_is_read_in_each_decode_step(tmp_path, write_pico_model):
    for model_type in ("gemma3_text", "smollm3"):
        path = write_pico_model(tmp_path / model_type, model_type)
        said = Checkpoint.read(path)
        edit_config(path, "tie_word_embeddings")
        base, _ = read(path)
        assert base.config["tie_word_embeddings"] is True
        assert base.decode_bytes == said.decode_bytes == base.size_bytes


# -- Gemma's embedding -----------------------------------------------------------------------------------------


def test_an_untied_gemma_keeps_its_logits_when_zeroed_dimensions_are_cut(tmp_path, write_pico_model, windows):
    """The embedding is corrected for √hidden_size; the lm_head, which isn't scaled, must not be."""
    path = write_pico_model(tmp_path / "m", "gemma3_text", dtype="float32", tie_word_embeddings=False)
    base, its_family = read(path)
    kept = torch.arange(96)[torch.arange(96) % 4 != 1]  # 72
    silent = torch.ones(96, dtype=torch.bool)
    silent[kept] = False
    whole = base.to_model("cpu", F32)
    whole.model.embed_tokens.weight.data[:, silent] = 0
    for layer in whole.model.layers:
        layer.self_attn.o_proj.weight.data[silent] = 0
        layer.mlp.down_proj.weight.data[silent] = 0
    for name in its_family.residual_norms(5):
        whole.get_submodule(name).weight.data[silent] = -1
    squares = [(~silent).float()] * 21
    cut = hidden.cut(base, its_family, kept, squares).to_model("cpu", F32)
    torch.testing.assert_close(logits(cut, windows), logits(whole, windows), atol=2e-3, rtol=1e-3)


# -- Qwen2 as a Llama ------------------------------------------------------------------------------------------


def test_a_cut_qwen2_is_a_qwen2_while_vllm_computes_its_head_dim_right(tmp_path, write_pico_model):
    base, its_family = read(write_pico_model(tmp_path / "m", "qwen2"))
    own = CompressionPlan.identity(base.config)
    for changes in ({"num_hidden_layers": 3}, {"hidden_size": 72, "num_attention_heads": 3}):
        made = build.apply(dataclasses.replace(own, **changes), base, its_family, None)
        assert made.config["model_type"] == "qwen2"
        assert made.tensors.keys() <= base.tensors.keys()


def test_a_qwen2_whose_head_dim_changes_becomes_the_llama_that_computes_the_same(tmp_path, write_pico_model, windows):
    path = write_pico_model(tmp_path / "m", "qwen2", dtype="float32")
    edit_config(path, "max_position_embeddings", "bos_token_id", "rms_norm_eps", "rope_parameters", rope_theta=1e6)
    base, its_family = read(path)
    cut = heads.cut(base, its_family, [((0, (0, 1)), (2, (4, 5)))] * 5)
    made = family.recast(cut, its_family)
    config = stock_config(made.config)
    assert (config.model_type, config.architectures, config.head_dim) == ("llama", ["LlamaForCausalLM"], 24)
    assert (config.max_position_embeddings, config.bos_token_id) == (32768, None)  # Qwen2's defaults, not Llama's
    assert "max_window_layers" not in made.config
    family.family_of(made)
    assert torch.equal(logits(made.to_model("cpu", F32), windows), logits(cut.to_model("cpu", F32), windows))


# -- EXAONE 3.5 as a Llama -------------------------------------------------------------------------------------


def test_exaone_3_is_read_as_a_llama(tmp_path, write_pico_exaone3, windows):
    path = write_pico_exaone3(tmp_path / "m", tie_word_embeddings=False)
    base, its_family = read(path)
    assert its_family.model_type == base.config["model_type"] == "llama"
    assert "auto_map" not in base.config
    base.write(tmp_path / "llama")
    again, _ = read(tmp_path / "llama")
    assert again.digest() == base.digest()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert torch.equal(logits(model, windows), logits(base.to_model("cpu"), windows))


@pytest.mark.skipif("exaone" not in CONFIG_MAPPING_NAMES, reason="this transformers knows no EXAONE 3")
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_stock_transformers_computes_the_same_from_an_exaone_3(tmp_path, write_pico_exaone3, windows, changes):
    path = write_pico_exaone3(tmp_path / "m", **changes)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    base, _ = read(path)
    assert torch.equal(logits(base.to_model("cpu"), windows), logits(model.eval(), windows))
    model.save_pretrained(tmp_path / "again")  # with transformers' own keys as well
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "again")
    again, _ = read(tmp_path / "again")
    assert torch.equal(logits(again.to_model("cpu"), windows), logits(model, windows))


@pytest.mark.parametrize("tied", [True, False])
def test_an_exaone_3_without_tie_word_embeddings_is_tied_as_its_weights_are(tmp_path, write_pico_exaone3, tied):
    path = write_pico_exaone3(tmp_path / "m", tie_word_embeddings=tied)
    edit_config(path, "tie_word_embeddings")  # of transformers 4 the default is true, of 5 false
    base, _ = read(path)
    assert base.config["tie_word_embeddings"] is tied


def test_rotary_frequencies_that_llama_2_stored_are_left_out(tmp_path, pico_llama, windows):
    path = shutil.copytree(pico_llama, tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    stored = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(12) for layer in range(5)}
    save_file({**tensors, **stored}, path / "model.safetensors", metadata={"format": "pt"})
    base, _ = read(path)
    assert base.tensors.keys() == tensors.keys()
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(logits(base.to_model("cpu"), windows), logits(model, windows))


@pytest.mark.parametrize("precision", ["float32", "W8A8"])
def test_a_cut_exaone_3_is_written_as_a_llama(tmp_path, write_pico_exaone3, windows, precision):
    base, its_family = read(write_pico_exaone3(tmp_path / "m"))
    plan = dataclasses.replace(
        CompressionPlan.identity(base.config),
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        hidden_size=72,
        precision=precision,
    )
    assert build.check(plan, base, its_family, max_bytes=None) is None
    statistics = activations.calibrate(base, windows)
    simulated = build.apply(plan, base, its_family, statistics, simulate=True).to_model("cpu", F32)
    build.apply(plan, base, its_family, statistics).write(tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["rope_scaling" if "rope_scaling" in config else "rope_parameters"]["rope_type"] == "llama3"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=F32)
    torch.testing.assert_close(logits(simulated, windows), logits(model, windows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("dropped", "changes", "said"),
    [
        (("rope_theta", "num_key_value_heads"), {}, "lacks num_key_value_heads, rope_theta, whose defaults differ"),
        (("layer_norm_epsilon",), {}, "lacks rms_norm_eps, whose defaults differ"),
        (
            (),
            {"architectures": ["ExaoneForSequenceClassification"]},
            "are read only as ExaoneForCausalLM or LlamaForCausalLM",
        ),
        ((), {"logit_scale": 0.5}, "logit_scale is 0.5"),
        ((), {"num_layers": 6}, "they hold 5 layers, and config.json has num_hidden_layers: 6"),
        (("num_layers",), {}, "config.json has num_hidden_layers: null; it must be a whole number"),
    ],
)
def test_an_exaone_3_of_another_kind_is_refused(tmp_path, write_pico_exaone3, dropped, changes, said):
    path = write_pico_exaone3(tmp_path / "m")
    edit_config(path, *dropped, **changes)
    with pytest.raises(CheckpointError, match=said) as caught:
        read(path)
    assert "\n" not in str(caught.value)


# -- vLLM ------------------------------------------------------------------------------------------------------

SERVED = {name: (name, {}) for name in family.names()} | {
    "llama with biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True})
}
PRECISIONS_SERVED = {
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, turned": {"precision": "bfloat16", "rotation": "pca"},
    "W8A8, turned, stream": {"precision": "W8A8", "rotation": "pca", "repair": "stream"},
    "W8A8": {"precision": "W8A8"},
    "W8A8, GPTQ": {"precision": "W8A8", "quantizer": "gptq"},
    "W8A8, smoothed": {"precision": "W8A8", "quantizer": "gptq", "smoothing": "smoothquant"},
    "W8A8, 8-bit lm_head": {"precision": "W8A8", "lm_head": "8-bit"},
    "W8A8, FP8 cache": {"precision": "W8A8", "kv_cache": "fp8"},
    "FP8_DYNAMIC": {"precision": "FP8_DYNAMIC"},
    "FP8_DYNAMIC, 8-bit lm_head": {"precision": "FP8_DYNAMIC", "lm_head": "8-bit"},
    "W4A16": {"precision": "W4A16", "hidden_size": 128},  # the kernels want multiples of 128
    "W4A16, GPTQ, group 64": {"precision": "W4A16", "hidden_size": 128, "quantizer": "gptq", "group_size": 64},
    "W4A16, 8-bit lm_head": {"precision": "W4A16", "hidden_size": 128, "lm_head": "8-bit"},
}
ALPHABET = 128


def walks(count, length, seed):
    """Return token ids [count, length]; each depends on the one two before it, which only attention can find."""
    table = torch.randint(3, 3 + ALPHABET, (ALPHABET, 4), generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 3 + ALPHABET, (count, length), generator=random)
    turns = torch.randint(4, (count, length), generator=random)
    for at in range(2, length):
        ids[:, at] = table[ids[:, at - 2] - 3, turns[:, at]]
    return ids


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_pico_model):
    """Write the models of SERVED, trained for some seconds: the loss of a random model hardly depends on loading."""

    @functools.cache
    def write(name):
        model_type, changes = SERVED[name]
        path = tmp_path_factory.mktemp("served") / "base"
        sizes = {
            "head_dim": 64 if family.named(model_type).with_head_dim is None else 32,
            "hidden_size": 192,
            "intermediate_size": 320,
        }
        sizes["vocab_size"] = 384  # a multiple of 128, as of the hidden size below, for Hopper's 4-bit kernels
        write_pico_model(path, model_type, initializer_range=0.05, **sizes, **changes)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=F32).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(200):
            ids = walks(16, 64, 100 + step).to(device)
            loss = model(ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 2.5  # of ln 128 = 4.85
        model.to(torch.bfloat16).cpu().save_pretrained(path)
        return path

    return write


@pytest.mark.vllm
@pytest.mark.skipif(backends.unavailable("vllm") is not None, reason=str(backends.unavailable("vllm")))
@pytest.mark.parametrize("how", PRECISIONS_SERVED)
@pytest.mark.parametrize("served", SERVED)
def test_vllm_serves_a_cut_model_as_transformers_does(tmp_path, trained, served, how):
    if "kv_cache" in PRECISIONS_SERVED[how] and not torch.cuda.is_available():
        pytest.skip("vLLM has FP8 caches on GPUs")
    if how == "W4A16, 8-bit lm_head" and not torch.cuda.is_available():
        pytest.skip("vLLM's CPU build multiplies no 8-bit weights with 16-bit activations")
    base, its_family = read(trained(served))
    own = CompressionPlan.identity(base.config)
    assert own.hidden_size == 192
    plan = dataclasses.replace(
        own,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        **{"hidden_size": 160, **PRECISIONS_SERVED[how]},
    )
    refused = build.check(plan, base, its_family, kernels=backends.kernels("vllm", "cuda"), max_bytes=None)
    if plan.kv_cache == "fp8" and not its_family.fp8_cache:
        assert refused is not None
        assert refused.startswith(f"kv_cache: vLLM runs a {served} through")
        return
    assert refused is None
    seen = walks(64, 64, 1).tolist()
    moment = second_moments.collect(base, {"walks": seen}, tmp_path / "moments", "cpu")
    build.apply(plan, base, its_family, activations.calibrate(base, seen), moments=moment).write(tmp_path / "cut")
    windows = walks(16, 128, 2).tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=F32).eval()
    scores = logits(model, windows)[:, :-1].log_softmax(-1)
    exact = -scores.gather(-1, torch.tensor(windows)[:, 1:, None])[..., 0]
    settings = backends.EngineSettings(max_model_len=256, threads=1, gpu_memory_utilization=0.1)
    with EngineProcess("vllm", tmp_path / "cut", settings, tmp_path / "log") as engine:
        found = torch.tensor(engine.nll(windows))
    assert float((found.mean() - exact.mean()).exp()) == pytest.approx(1, abs=0.02)  # perplexity
    # activations rounded to 8 bits from bfloat16 and from float32 are less alike
    far = 0.05 if plan.precision in ("bfloat16", "W4A16") else 0.15
    assert float((found - exact).abs().mean()) < far * float(exact.std())
