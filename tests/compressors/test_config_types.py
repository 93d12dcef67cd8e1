"""Test that values of wrong types in config.json and tokenizer_config.json are refused by their keys."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

from compressors.errors import CheckpointError
from compressors.model import config_types
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import family_of


@pytest.fixture
def model(pico_llama, tmp_path):
    return Path(shutil.copytree(pico_llama, tmp_path / "model"))


def edit(path, **changes):
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"dtype": "load"}, "dtype: 'load'; it must be a dtype of torch"),
        ({"dtype": "nn"}, "it must be a dtype of torch"),
        ({"dtype": "Tensor"}, "it must be a dtype of torch"),
        ({"torch_dtype": "torch.save"}, "it must be a dtype of torch"),
        ({"dtype": "__name__"}, "it must be a dtype of torch"),
        ({"dtype": 16}, "it must be a dtype of torch"),
        ({"dtype": {"a": 1}}, "it must be a dtype of torch"),
        ({"quantization_config": "int8"}, "quantization_config: 'int8'; it must be an object"),
        ({"quantization_config": ["int8"]}, "it must be an object"),
        ({"quantization_config": 8}, "it must be an object"),
        ({"quantization_config": True}, "it must be an object"),
        ({"quantization_config": {"config_groups": "all"}}, "config_groups: 'all'; it must be an object of groups"),
        ({"quantization_config": {"config_groups": {"g": 3}}}, "g: 3; it must be an object"),
        ({"quantization_config": {"config_groups": {"g": {"weights": {"num_bits": "x"}}}}}, "num_bits: 'x'"),
        ({"quantization_config": {"ignore": "lm_head"}}, "ignore: 'lm_head'; it must be a list"),
        ({"quantization_config": {"ignore": ["re:(a+)+$"]}}, "it must be a list of names and simple patterns"),
        ({"quantization_config": {"ignore": ["re:" + ".*" * 30 + "x"]}}, "list of names and simple patterns"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: 'false'; it must be true or false"),
        ({"hidden_act": 3}, "hidden_act: 3; it must be a string"),
        ({"head_dim": -24}, "head_dim: -24; it must be a whole number of 1 or more"),
        ({"head_dim": 24.5}, "head_dim: 24.5"),
        ({"num_key_value_heads": [3]}, "num_key_value_heads: [3]"),
        ({"vocab_size": "320"}, "vocab_size: '320'"),
        ({"vocab_size": 10**30}, "vocab_size: 1000000"),
        ({"max_position_embeddings": {}}, "max_position_embeddings: {}"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: '1e-5'; it must be a finite number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan; it must be a finite number"),
        ({"rope_theta": [1e4]}, "rope_theta: [10000.0]"),
        ({"rope_parameters": "default"}, "rope_parameters: 'default'; it must be an object"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_scaling: {'rope_type': 3}"),
        ({"rope_scaling": {"factor": "8"}}, "rope_scaling: {'factor': '8'}"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: 'LlamaForCausalLM'; it must be a list of strings"),
        ({"architectures": [1]}, "architectures: [1]"),
        ({"layer_types": "full_attention"}, "layer_types: 'full_attention'"),
        ({"eos_token_id": "</s>"}, "eos_token_id: '</s>'; it must be the number of a token"),
        ({"attention_bias": 0}, "attention_bias: 0; it must be true or false"),
        ({"num_hidden_layers": True}, "num_hidden_layers: True"),
        ({"hidden_size": "x" * 100_000}, "hidden_size: '"),
        ({"transformers_version": 5}, "transformers_version: 5; it must be a string"),
    ],
)
def test_a_value_of_a_wrong_type_in_config_json_is_refused_by_its_key(changes, rule, model):
    edit(model / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        family_of(Checkpoint.read(model))
    # some keys are checked by `config_values` and with the weights, in their words
    key, said = next(iter(changes)).rstrip("s"), str(caught.value)
    assert rule in said or key in said or "is quantized already" in said or "by config.json it is" in said
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "changes", "rule"),
    [
        ("tokenizer_config.json", {"model_max_length": "512"}, "model_max_length: '512'; it must be a number above 0"),
        ("tokenizer_config.json", {"model_max_length": -1}, "it must be a number above 0"),
        ("tokenizer_config.json", {"model_max_length": [1]}, "it must be a number above 0"),
        ("tokenizer_config.json", {"bos_token": 3}, "bos_token: 3; it must be a string or an object"),
        ("tokenizer_config.json", {"padding_side": "up"}, 'padding_side: \'up\'; it must be "left" or "right"'),
        ("tokenizer_config.json", {"additional_special_tokens": 5}, "additional_special_tokens: 5"),
        ("tokenizer_config.json", {"extra_special_tokens": "x"}, "extra_special_tokens: 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder: [1]"),
        ("tokenizer_config.json", {"tokenizer_class": {}}, "tokenizer_class: {}; it must be a string"),
        ("tokenizer_config.json", {"chat_template": 1}, "chat_template: 1"),
        ("special_tokens_map.json", {"eos_token": ["</s>"]}, "eos_token: ['</s>']"),
        ("tokenizer_config.json", {"clean_up_tokenization_spaces": "no"}, "it must be true or false"),
    ],
)
def test_a_value_of_a_wrong_type_in_a_tokenizers_file_is_refused_by_its_key(name, changes, rule, model):
    edit(model / name, **changes)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.read(model)
    assert f"{name} has " in str(caught.value)
    assert rule in str(caught.value)


DEEP = '{"a":' * 3000 + "1" + "}" * 3000


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (DEEP, "nested more than 50 levels"),
        ("[]", "holds no JSON object"),
        ("{", "can't be read"),
        (b"\xff{}", "it is not UTF-8"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
    ],
)
def test_json_that_no_library_should_read_is_refused(name, text, reason, model):
    (model / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.read(model)
    assert name in str(caught.value)
    assert reason in str(caught.value)


def test_a_deeply_nested_index_is_refused(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(DEEP)
    with pytest.raises(CheckpointError, match=r"index\.json can't be read \(it is nested more than 50"):
        Checkpoint.read(model)


def test_the_weights_header_must_not_hold_a_tensor_twice(model):
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "model.safetensors")
    data = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().rstrip()
    entry = '"model.norm.weight":{"dtype":"BF16","shape":[96],"data_offsets":[0,192]}'
    assert "model.norm.weight" in header
    twice = header.replace('{"', "{" + entry + ',"', 1).encode()
    (model / "model.safetensors").write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + length :])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Checkpoint.read(model)


def test_what_transformers_writes_for_every_family_is_of_the_right_types(pico):
    config = json.loads((pico / "config.json").read_text())
    config_types.require_config(pico, config)
    full = transformers.AutoConfig.from_pretrained(pico).to_dict()
    config_types.require_config(pico, {key: value for key, value in full.items() if key != "dtype"})
    config_types.require_tokenizer_files(pico, [path.name for path in pico.iterdir()])


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": None, "torch_dtype": "bfloat16"},
        {"dtype": "torch.bfloat16"},
        {"dtype": "auto"},
        {"eos_token_id": [1, 2]},
        {"pad_token_id": -1},
        {"sliding_window": None, "sliding_window_pattern": "LLLG"},
        {"rope_scaling": {"type": "yarn", "factor": 8.0, "long_factor": [1.0, 2], "truncate": False, "x": None}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"quantization_config": {"ignore": ["lm_head", r"re:.*self_attn\.(q|k)_proj$"], "config_groups": {}}},
    ],
)
def test_what_published_models_hold_is_of_the_right_types(changes, pico_llama):
    config = json.loads((pico_llama / "config.json").read_text())
    config_types.require_config(pico_llama, config | changes)


def test_a_model_of_an_unknown_family_may_use_the_keys_otherwise(tmp_path):
    config_types.require_config(tmp_path, {"model_type": "other", "num_key_value_heads": [1, 2], "dtype": "strange"})
    with pytest.raises(CheckpointError, match="quantization_config"):
        config_types.require_config(tmp_path, {"model_type": "other", "quantization_config": "strange"})
