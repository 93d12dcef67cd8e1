"""Test reading and writing checkpoints, their digests, and what is refused."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressors.errors import CheckpointError
from compressors.model import checkpoint as model_checkpoint
from compressors.model import family
from compressors.model.checkpoint import Checkpoint


@pytest.fixture
def copy(pico_llama, tmp_path):
    shutil.copytree(pico_llama, tmp_path / "model")
    return tmp_path / "model"


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        family.family_of(Checkpoint.read(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_write_creates_a_file_that_safetensors_reads_and_returns_its_sha256(pico, tmp_path):
    base = Checkpoint.read(pico)
    sha256 = base.write(tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    assert sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    (header,) = struct.unpack("<Q", weights.read_bytes()[:8])
    assert header % 8 == 0, "tensors must be aligned for readers that map the file into memory"
    there, original = load_file(weights), load_file(pico / "model.safetensors")
    assert there.keys() == original.keys()
    assert all(torch.equal(there[name], original[name]) for name in there)
    assert weights.stat().st_size == base.file_bytes
    assert os.listdir(tmp_path) == ["out"]
    assert os.stat(tmp_path / "out").st_mode & 0o777 == 0o755


def test_sharded_checkpoints_are_read_and_written_as_one(pico_llama, copy, tmp_path):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:10], names[10:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, copy / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sharded = Checkpoint.read(copy)
    assert sharded.digest() == Checkpoint.read(pico_llama).digest()
    sharded.write(tmp_path / "one")
    assert not list((tmp_path / "one").glob("*index*"))
    (copy / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refused(copy)


def test_the_digest_changes_with_a_weight_and_with_the_config(copy, tmp_path):
    cache = tmp_path / "cache"
    first = model_checkpoint.digest_of(copy, cache)
    assert first == Checkpoint.read(copy).digest() == model_checkpoint.digest_of(copy, cache)
    edit_config(copy, rms_norm_eps=1e-4)
    second = model_checkpoint.digest_of(copy, cache)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert len({first, second, model_checkpoint.digest_of(copy, cache)}) == 3


def test_truncated_and_corrupt_weights_are_refused(copy):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-7], whole[:5], b"", struct.pack("<Q", 1 << 60) + whole[8:], b"PK" + whole):
        weights.write_bytes(damaged)
        assert "not a whole safetensors file" in refused(copy)


def test_missing_files_are_named(copy):
    (copy / "tokenizer.json").rename(copy / "t")
    assert "tokenizer" in refused(copy)
    (copy / "t").rename(copy / "tokenizer.json")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pickled" in refused(copy)
    (copy / "pytorch_model.bin").unlink()
    assert "has no weights" in refused(copy)
    (copy / "config.json").unlink()
    assert "config.json" in refused(copy)


def test_a_config_that_is_not_json_is_refused(copy):
    (copy / "config.json").write_text("{")
    assert "config.json" in refused(copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba9"}, f"'mamba9' is not known here; known are {', '.join(family.names())} ("),
        ({"attention_bias": True}, "20 are missing, model.layers.0.self_attn.k_proj.bias first"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"num_hidden_layers": 6}, "they hold 5 layers, and config.json has num_hidden_layers: 6"),
        ({"num_hidden_layers": 4}, "they hold 5 layers, and config.json has num_hidden_layers: 4"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized already (awq)"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"hidden_size": 48}, "self_attn.q_proj.weight is 144 × 96, but by config.json it is 144 × 48; use"),
        ({"vocab_size": 300}, "model.embed_tokens.weight is 320 × 96, but by config.json it is 300 × 96"),
        ({"head_dim": None}, "q_proj.weight is 144 × 96, but by config.json it is 96 × 96"),
        ({"num_key_value_heads": None}, "k_proj.weight is 72 × 96, but by config.json it is 144 × 96"),
        (
            {"num_key_value_heads": "three"},
            'num_key_value_heads: "three"; it must be a whole number of 1 or more, or null',
        ),
        ({"num_attention_heads": 7}, "num_key_value_heads: 3, which does not divide num_attention_heads: 7"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000, but the weights hold 47 tensors"),
        ({"dtype": "foo16"}, 'dtype: "foo16"; write the dtype of the weights'),
    ],
)
def test_architectures_that_are_not_supported_are_refused_by_name(copy, changes, said):
    edit_config(copy, **changes)
    assert said in refused(copy)


@pytest.mark.parametrize(
    ("changes", "dropped", "said"),
    [
        ({}, "sliding_window", "sliding_window is 4096 (transformers' default, since config.json lacks it)"),
        ({"sliding_window": 64}, None, "sliding_window is 64, but exaone4 models must have null;"),
        ({"layer_types": ["sliding_attention", *["full_attention"] * 4]}, None, 'layer_types is ["sliding_attention"'),
        ({"layer_types": ["full_attention"] * 4}, None, "4 layer_types, and num_hidden_layers: 5"),
    ],
)
def test_exaone_with_sliding_windows_is_refused_also_if_they_are_the_default(
    pico_exaone4, tmp_path, changes, dropped, said
):
    shutil.copytree(pico_exaone4, tmp_path / "model")
    edit_config(tmp_path / "model", **changes)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.pop(dropped, None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert said in refused(tmp_path / "model")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"model.norm.weight": 3}, {"model.norm.weight": "../x"}])
def test_an_index_that_names_no_files_is_refused(copy, weight_map):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model.safetensors.index.json" in refused(copy)


def test_weights_that_are_not_floating_point_are_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight is int8" in refused(copy)


def test_a_stored_tied_head_is_counted_and_written_once(pico_llama, copy):
    """transformers unties a head that differs from the embedding and vLLM does not: they would serve two models."""
    tensors = load_file(copy / "model.safetensors")
    for factor in (1, 2):
        both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * factor}
        save_file(both, copy / "model.safetensors", metadata={"format": "pt"})
        if factor == 1:
            found, plain = Checkpoint.read(copy), Checkpoint.read(pico_llama)
            assert found.total_parameters == plain.total_parameters
            assert found.file_bytes == plain.file_bytes
            assert found.decode_bytes == plain.decode_bytes
            family.family_of(found)
        else:
            assert "lm_head.weight is not the embedding" in refused(copy)


def test_a_config_without_dtype_gets_that_of_the_weights(copy):
    from compressors.plan import CompressionPlan

    config = json.loads((copy / "config.json").read_text())
    del config["dtype"]
    (copy / "config.json").write_text(json.dumps(config))
    assert CompressionPlan.identity(Checkpoint.read(copy).config).precision == "bfloat16"


def test_writing_replaces_the_directory_and_leaves_no_scratch_files(pico_llama, tmp_path):
    base = Checkpoint.read(pico_llama)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.safetensors").write_text("")
    first = base.write(tmp_path / "out")
    assert "stale.safetensors" not in os.listdir(tmp_path / "out")
    again = Checkpoint.read(tmp_path / "out")
    assert again.write(tmp_path / "out") == first  # onto its own source
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_write_keeps_the_old_directory(pico_llama, tmp_path):
    base = Checkpoint.read(pico_llama)
    base.write(tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    wrong = model_checkpoint.LazyTensor((2, 2), torch.float32, lambda: torch.zeros(3, 2))
    with pytest.raises(CheckpointError, match="announced as"):
        Checkpoint(base.config, {**base.tensors, "wrong": wrong}, base.files).write(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_rename_restores_the_old_directory(pico_llama, tmp_path, monkeypatch):
    base = Checkpoint.read(pico_llama)
    base.write(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    replace = pathlib.Path.replace

    def fails(self, target):
        if (self / "config.json").is_file() and target == tmp_path / "out" and not moved:
            moved.append(self)
            raise OSError(5, "Input/output error")
        return replace(self, target)

    moved = []
    monkeypatch.setattr(pathlib.Path, "replace", fails)
    with pytest.raises(CheckpointError, match="Input/output error; nothing was changed there"):
        Checkpoint({**base.config, "vocab_size": 1}, base.tensors).write(tmp_path / "out")
    assert moved
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_the_digest_of_a_directory_without_a_model_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        model_checkpoint.digest_of(tmp_path, tmp_path / "cache")


def test_an_untied_head_is_kept_cut_and_counted(tmp_path, write_pico_model):
    from compressors import build
    from compressors.plan import CompressionPlan

    path = write_pico_model(tmp_path / "untied", "llama", tie_word_embeddings=False)
    base = Checkpoint.read(path)
    its_family = family.family_of(base)
    tied_bytes = base.size_bytes - base.decode_bytes
    assert tied_bytes == 320 * 96 * 2
    plan = CompressionPlan.from_dict({**CompressionPlan.identity(base.config).to_dict(), "hidden_size": 72})
    made = build.apply(plan, base, its_family, None)
    assert made.tensors["lm_head.weight"].shape == (320, 72)
    made.to_model("cpu")


def test_a_full_disk_leaves_no_partial_files(pico_llama, tmp_path):
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(CheckpointError, match="No space left"):
            Checkpoint.read(pico_llama).write(small / "m")
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_config_in_the_form_of_transformers_4_is_not_changed(pico_exaone4, tmp_path):
    """EXAONE-4.0 has such a config on the hub, and transformers 5 changes the nested dict that it is given."""
    from compressors.model.transformers_version import retarget

    path = shutil.copytree(pico_exaone4, tmp_path / "model")
    retarget(path, "4.57.3")
    written = json.loads((path / "config.json").read_text())
    assert "rope_type" in written["rope_scaling"]
    checkpoint = Checkpoint.read(path)
    before = checkpoint.digest()
    family.family_of(checkpoint)
    checkpoint.to_model()
    assert checkpoint.config == written
    assert dataclasses.replace(checkpoint).digest() == before  # computed anew
