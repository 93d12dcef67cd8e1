import hashlib
import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressors import checkpoint, family
from compressors.checkpoint import Checkpoint
from compressors.errors import CheckpointError


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


def test_write_gives_what_safetensors_reads_and_the_sha256_of_the_file(pico, tmp_path):
    base = Checkpoint.read(pico)
    sha256 = base.write(tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    assert sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
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
    first = checkpoint.digest_of(copy, cache)
    assert first == Checkpoint.read(copy).digest() == checkpoint.digest_of(copy, cache)
    edit_config(copy, rms_norm_eps=1e-4)
    second = checkpoint.digest_of(copy, cache)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert len({first, second, checkpoint.digest_of(copy, cache)}) == 3


def test_truncated_and_corrupt_weights(copy):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-7], whole[:5], b"", struct.pack("<Q", 1 << 60) + whole[8:], b"PK" + whole):
        weights.write_bytes(damaged)
        assert "not a whole safetensors file" in refused(copy)


def test_what_is_missing_is_named(copy):
    (copy / "tokenizer.json").rename(copy / "t")
    assert "tokenizer" in refused(copy)
    (copy / "t").rename(copy / "tokenizer.json")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pickled" in refused(copy)
    (copy / "pytorch_model.bin").unlink()
    assert "has no weights" in refused(copy)
    (copy / "config.json").unlink()
    assert "config.json" in refused(copy)


def test_a_config_that_is_no_json(copy):
    (copy / "config.json").write_text("{")
    assert "config.json" in refused(copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba9"}, "'mamba9' is not known here; known are exaone4, llama"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_hidden_layers": 6}, "9 are missing, model.layers.5"),
        ({"num_hidden_layers": 4}, "9 are not known to llama, model.layers.4"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised already (awq)"),
    ],
)
def test_architectures_that_are_not_understood_are_refused_by_name(copy, changes, said):
    edit_config(copy, **changes)
    assert said in refused(copy)


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


def test_a_full_disk_leaves_nothing_half_written(pico_llama, tmp_path):
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
