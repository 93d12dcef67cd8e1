"""Test unusual configs and weights: the right ones compute what stock transformers does, and the rest is refused."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compressors.errors import CheckpointError
from compressors.model import family
from compressors.model.checkpoint import Checkpoint
from compressors.model.odd import is_odd
from search.setup import sources

F32 = torch.float32
WINDOWS = torch.randint(3, 320, (2, 30), generator=torch.Generator().manual_seed(1))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 12, "long_factor": [2.0] * 12}


@pytest.fixture
def copy(pico_llama, tmp_path):
    return shutil.copytree(pico_llama, tmp_path / "model")


@pytest.fixture
def exaone(pico_exaone4, tmp_path):
    return shutil.copytree(pico_exaone4, tmp_path / "model")


def edit(path, *dropped, **changes):
    config = json.loads((path / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in dropped}
    (path / "config.json").write_text(json.dumps({**kept, **changes}))


def rename(path, change):
    tensors = {change(name): tensor for name, tensor in load_file(path / "model.safetensors").items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, path / "model.safetensors")


def bare(name):
    return name.removeprefix("model.")


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        family.family_of(Checkpoint.read(path))
    said = str(caught.value)
    assert "\n" not in said
    assert len(said.removeprefix(f"model {path}")) < 300
    return said


def logits(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=F32).eval()
    with torch.inference_mode():
        return model(WINDOWS, use_cache=False).logits


def same_through_us(path, to):
    """Check that what we read and write computes what stock transformers computes from the original."""
    base = Checkpoint.read(path)
    family.family_of(base)
    base.write(to)
    assert torch.equal(logits(to), logits(path))


# -- what is right, and computes the same ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dropped", "changes"),
    [
        ((), {"eos_token_id": [1, 5], "pad_token_id": None, "architectures": None}),
        (("rope_parameters",), {"rope_theta": 5e3, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        (("rope_parameters", "max_position_embeddings"), {"rope_theta": 5e3, "rope_scaling": {**YARN, "factor": None}}),
        ((), {"rope_parameters": {**LONGROPE, "rope_theta": 5e3, "original_max_position_embeddings": 16}}),
        (("dtype",), {"torch_dtype": "torch.bfloat16"}),
        ((), {"dtype": "auto"}),
    ],
)
def test_an_unusual_config_computes_what_stock_transformers_does(copy, tmp_path, dropped, changes):
    edit(copy, *dropped, **changes)
    same_through_us(copy, tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "llama_untied", "gemma3_text"])
def test_weights_of_the_base_class_are_read_under_the_names_of_the_class_with_a_head(tmp_path, write_pico_model, name):
    path = write_pico_model(tmp_path / "m", name)
    whole = Checkpoint.read(path)
    rename(path, bare)
    edit(path, architectures=["LlamaModel"] if name == "llama" else None)
    assert Checkpoint.read(path).tensors.keys() == whole.tensors.keys()
    same_through_us(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("torch.bfloat16", "bfloat16"),
        ("auto", "bfloat16"),
        ("", "bfloat16"),
        ("bf16", "bfloat16"),
        ("half", "float16"),
        ("fp16", "float16"),
        ("torch.float32", "float32"),
        ("float", "float32"),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_is_read_in_any_spelling(copy, key, written, wanted):
    edit(copy, "dtype", **{key: written})
    config = Checkpoint.read(copy).config
    assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {wanted}
    edit(copy, dtype="bfloat16", torch_dtype="torch.bfloat16")
    assert Checkpoint.read(copy).config["dtype"] == "bfloat16"


@pytest.mark.parametrize("pattern", ["LLLG", 4, 0, None])
def test_an_exaone_4_without_a_window_has_full_attention_everywhere(exaone, pattern):
    edit(exaone, "layer_types", sliding_window=None, sliding_window_pattern=pattern)
    base = Checkpoint.read(exaone)
    family.family_of(base)
    assert base.config["layer_types"] == ["full_attention"] * 5


def test_a_usual_config_is_left_as_it_is(pico):
    """Digests and cache keys hang on it."""
    config = json.loads((pico / "config.json").read_text())
    assert Checkpoint.read(pico).config == config
    assert not is_odd(pico)


def test_a_model_that_some_loaders_do_not_read_is_rewritten_once(copy, pico_llama, tmp_path):
    before = Checkpoint.read(copy).digest()
    rename(copy, bare)
    edit(copy, "dtype", "architectures", torch_dtype="torch.bfloat16")
    assert is_odd(copy)
    said = []
    place = sources.resolve(str(copy), tmp_path / "cache", say=said.append)
    assert place != copy
    assert sources.resolve(str(copy), tmp_path / "cache", say=said.append) == place
    assert said == [f"model model: converting to the form that every server reads in {place}"]
    config = json.loads((place / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(place, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert model.dtype == torch.bfloat16
    edit(place, "torch_dtype", dtype="bfloat16")
    assert Checkpoint.read(place).digest() == before
    assert sources.resolve(str(pico_llama), tmp_path / "cache") == pico_llama.resolve()


# -- what is refused, by key and value -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "int8"}, 'dtype: "int8"; write the dtype of the weights, one of float32, float16, bfloat16'),
        ({"dtype": "load"}, 'dtype: "load"; write'),
        ({"dtype": {"": "bfloat16"}}, 'dtype: {"": "bfloat16"}; write'),
        ({"torch_dtype": "float16"}, "dtype: bfloat16 and torch_dtype: float16; remove the wrong key"),
        ({"num_hidden_layers": True}, "num_hidden_layers: true; it must be a whole number of 1 or more"),
        ({"hidden_size": 96.0}, "hidden_size: 96.0; it must be"),
        ({"num_attention_heads": -6}, "num_attention_heads: -6; it must be"),
        ({"vocab_size": "320"}, 'vocab_size: "320"; it must be'),
        ({"max_position_embeddings": 0}, "max_position_embeddings: 0; it must be"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: 0; it must be a whole number of 1 or more, or null"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4, which does not divide num_attention_heads: 6"),
        ({"head_dim": 23}, "head_dim: 23; the rotary embedding needs an even number"),
        ({"head_dim": -24}, "head_dim: -24; it must be"),
        ({"pad_token_id": 320}, "pad_token_id: 320, and vocab_size: 320; write a token"),
        ({"eos_token_id": "1"}, 'eos_token_id: "1", which llama models don\'t take; it must be a whole number'),
        ({"tie_word_embeddings": None}, "tie_word_embeddings: null, which llama models don't take; it must be true or"),
        ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps: "1e-5", which llama models don\'t take; it must be a number with'),
        ({"hidden_size": 100}, "hidden size (100) is not a multiple of the number of attention heads (6)"),
        ({"layer_types": "full_attention"}, 'layer_types: "full_attention"; it must be a list with full_attention or'),
        ({"layer_types": ["full"] * 5}, 'layer_types: ["full", "full", "full", "full", "full"]; it must be a list'),
        ({"layer_types": ["full_attention"]}, "1 layer_types, and num_hidden_layers: 5; write one for each layer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: NaN; it must be a number above 0"),
        ({"text_config": {"hidden_size": 3}}, 'text_config: {"hidden_size": 3}, which llama models don\'t have'),
        ({"per_layer_config": {"1": {"intermediate_size": 8}}}, "per_layer_config: {"),
        ({"no_rope_layers": [1]}, "no_rope_layers: [1]; it must be a list of 1 (rotary) or 0 for each of the 5 layers"),
        ({"model_type": None}, "model_type: null; write the name of an architecture, that of LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, 'architectures: "LlamaForCausalLM"; write ["LlamaForCausalLM"]'),
        ({"architectures": ["LlamaModel"]}, "names LlamaModel, but llama models are read only as LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized already (gptq); start from"),
        ({"quantization_config": {"load_in_4bit": True}}, "is quantized already (load_in_4bit); start from"),
        ({"quantization_config": "awq"}, "is quantized already (awq); start from"),
        ({"quantization_config": {}}, "an empty quantization_config, which no loader takes; remove it"),
        ({"compression_config": {"format": "dense"}}, "is quantized already ("),
        ({"rope_theta": 7}, "contradicts itself (rope_parameters.rope_theta: 5000.0, rope_theta: 7); remove"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "contradicts itself (rope_parameters: {'rope_type': 'defa"),
        ({"rope_parameters": {"rope_type": "foo"}}, "rope_type: foo in rope_parameters, which transformers doesn't"),
        ({"rope_parameters": {"type": "mrope"}}, "rope_type: mrope in rope_parameters, which transformers doesn't"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "no factor in rope_parameters, which yarn needs; add it"),
        ({"rope_parameters": {**YARN, "type": "linear"}}, "rope_type: yarn and type: linear in rope_parameters; remov"),
        ({"rope_parameters": {**YARN, "factor": "4"}}, "factor: '4' in rope_parameters; it must be a number above 0"),
        ({"rope_parameters": {**YARN, "factor": 0}}, "factor: 0 in rope_parameters; it must be a number above 0"),
        ({"rope_parameters": {**LONGROPE, "long_factor": [2.0]}}, "1 numbers as long_factor in rope_parameters; it"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5 in rope_parameters, and"),
        ({"rope_parameters": {"full_attention": YARN}}, "by the type of layer (full_attention), which llama mode"),
        ({"rope_parameters": [1]}, "rope_parameters: [1]; it must be an object, or null"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_key_and_the_rule(copy, changes, said):
    edit(copy, **changes)
    assert said in refused(copy)


def test_a_value_that_only_transformers_knows_is_refused_with_one_short_line(copy):
    edit(copy, problem_type="single_label_classification", num_labels=1)
    said = refused(copy)
    assert said.startswith("config.json is no llama model's for transformers")
    assert said.endswith("correct the key in question, or copy config.json again")


@pytest.mark.parametrize(("pattern", "window"), [("LLLG", 16), (0, 16), (None, 16), ("", 4096)])
def test_an_exaone_4_whose_pattern_transformers_can_not_unfold_is_asked_for_layer_types(exaone, pattern, window):
    edit(exaone, "layer_types", sliding_window=window, sliding_window_pattern=pattern)
    said = refused(exaone)
    assert f"sliding_window_pattern: {json.dumps(pattern)} with sliding_window: {window} and no layer_types" in said
    assert "write a list with full_attention or sliding_attention for each layer" in said


def test_gemmas_settings_for_all_layers_together_are_refused_since_they_are_not_read(tmp_path, write_pico_model):
    path = write_pico_model(tmp_path / "m", "gemma3_text")
    edit(path, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert "rope_parameters without full_attention and sliding_attention" in refused(path)
    edit(path, "rope_parameters", rope_theta=1e6, rope_scaling={"type": "linear", "factor": 8.0})
    assert "write rope_type instead of type" in refused(path)


# -- weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name: f"_orig_mod.{name}", 'begin with "_orig_mod.model.", as torch.compile saves them'),
        (lambda name: f"module.{name}", 'begin with "module.model.", as a distributed trainer saves them'),
        (lambda name: f"base_model.model.{name}", 'begin with "base_model.model.model.", as an adapter library'),
        (lambda name: name.replace("model.", "model.language_model."), 'begin with "model.language_model.", as a mod'),
        (lambda name: name.replace("model.", "transformer."), 'begin with "transformer.", as another architecture'),
        (lambda name: name.replace("model.", "backbone."), 'begin with "backbone." (backbone.embed_tokens.weight for'),
        (lambda name: name.replace("q_proj.", "q_proj.base_layer."), "hold an adapter (model.layers.0.self_attn.q_pro"),
        (lambda name: bare(name) if "layers.3" in name else name, '9 names lack "model." (layers.3.input_layernorm.w'),
        (lambda name: None if "layers.2." in name else name, "layer 2 of the layers 0 to 4 is missing"),
        (lambda name: f"blk.{name.rpartition('.')[0]}", "none of the names is known, blk.model.embed_tokens first"),
        (lambda name: name.replace("norm.weight", "norm.gain"), "11 are missing, model.layers.0.input_layernorm.weig"),
    ],
)
def test_names_of_another_kind_are_refused_with_what_is_wrong_about_them(copy, change, said):
    rename(copy, change)
    assert f"weights: {said}" in refused(copy).replace("their names ", "").replace("they ", "")


def test_a_base_class_without_its_head_is_refused_with_what_its_names_lack(tmp_path, write_pico_model):
    path = write_pico_model(tmp_path / "m", "llama_untied")
    rename(path, lambda name: None if name == "lm_head.weight" else bare(name))
    assert '82 names lack "model." (embed_tokens.weight is there' in refused(path)


def split(path, **second):
    """Write the weights in two shards, and `second` into the other one too; return the names of the shards."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    parts = [{name: tensors[name] for name in part} for part in (names[:20], names[20:])]
    parts[1] |= {name.replace("__", "."): value for name, value in second.items()}
    for file, part in zip(files, parts, strict=True):
        save_file(part, path / file)
    weight_map = {name: file for part, file in zip(reversed(parts), reversed(files), strict=True) for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def test_a_weight_in_two_shards_is_read_where_they_agree_and_refused_where_they_do_not(copy, pico_llama):
    own = load_file(copy / "model.safetensors")["model.embed_tokens.weight"]
    split(copy, model__embed_tokens__weight=own)
    (copy / "model.safetensors").unlink()
    assert Checkpoint.read(copy).digest() == Checkpoint.read(pico_llama).digest()
    shutil.copy(pico_llama / "model.safetensors", copy)
    split(copy, model__embed_tokens__weight=own * 2)
    (copy / "model.safetensors").unlink()
    said = refused(copy)
    assert "model.embed_tokens.weight is in model-00001-of-00002.safetensors and in model-00002-of-00002" in said
    assert "with different values" in said


def test_shards_next_to_the_whole_file_must_agree_with_it(copy):
    files = split(copy)
    family.family_of(Checkpoint.read(copy))
    shard = load_file(copy / files[0])
    save_file({name: tensor + 1 for name, tensor in shard.items()}, copy / files[0])
    assert f"is in model.safetensors and in {files[0]} with different values" in refused(copy)
    save_file({**shard, "model.more.weight": torch.zeros(2)}, copy / files[0])
    assert f"{files[0]} next to model.safetensors holds model.more.weight, which that file lacks" in refused(copy)
