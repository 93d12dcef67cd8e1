"""Test that a checkpoint is finite and loads before it is used."""

import dataclasses
import json
import pickle

import pytest
import torch

from compressors import build
from compressors.errors import CheckpointError, NotFiniteWeights
from compressors.methods import precision
from compressors.model import family, loading
from compressors.model.checkpoint import Checkpoint, LazyTensor
from compressors.plan import CompressionPlan

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def wide(write_pico_model, tmp_path_factory):
    """A model whose widths are multiples of 32, as groups of W4A16 are."""
    return write_pico_model(tmp_path_factory.mktemp("wide") / "m", "llama", head_dim=32)


def broken(checkpoint, *values, name=GATE):
    """Return the checkpoint with a tensor that begins with `values`."""
    tensor = checkpoint.tensors[name].load().clone()
    tensor.view(-1)[: len(values)] = torch.tensor(values, dtype=tensor.dtype)
    return dataclasses.replace(
        checkpoint, tensors={**checkpoint.tensors, name: LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.clone)}
    )


def refused(made, base, path):
    with pytest.raises(NotFiniteWeights) as caught:
        loading.write_checked(made, path, base, None)
    assert not path.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_whole_is_written_for_its_version(pico, tmp_path):
    base = Checkpoint.read(pico)
    sha256, changes = loading.write_checked(base, tmp_path / "m", base, "4.57.3")
    assert len(sha256) == 64
    assert changes


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "W4A16"])
def test_what_is_quantized_loads_too(wide, tmp_path, scheme):
    base = Checkpoint.read(wide)
    made = precision.quantize(base, family.family_of(base), scheme)
    loading.write_checked(made, tmp_path / "m", base, None)


def test_a_base_model_that_is_not_finite_is_named(pico_llama, tmp_path):
    base = broken(Checkpoint.read(pico_llama), float("nan"), float("-inf"), 3e4, float("inf"))
    said = refused(base, base, tmp_path / "m")
    assert said.startswith(
        f"weights: the base model's {GATE} holds 1 NaN and 2 infinite among 15360 values; the largest"
    )
    assert "is 29952; copy or download it again" in said


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "W4A16"])
def test_a_scale_that_is_not_finite_names_the_weight_that_it_is_made_of(wide, tmp_path, scheme):
    base = broken(Checkpoint.read(wide), float("nan"))
    made = precision.quantize(base, family.family_of(base), scheme)
    assert f"the base model's {GATE} holds 1 NaN" in refused(made, base, tmp_path / "m")


def test_an_overflow_names_the_tensor_the_count_and_the_maximum(pico_llama, tmp_path):
    base = broken(Checkpoint.read(pico_llama), 1e5, -2e5, 65504.0)
    said = refused(precision.cast(base, "float16"), base, tmp_path / "m")
    assert f"{GATE} has 3 of 15360 values beyond 65504, the largest number of float16, up to 199680" in said
    assert said.endswith("choose bfloat16 or float32")
    loading.write_checked(precision.cast(base, "float32"), tmp_path / "m", base, None)


def test_a_method_that_makes_a_weight_nan_is_told_apart_from_the_base_model(pico_llama, tmp_path):
    base = Checkpoint.read(pico_llama)
    said = refused(broken(base, float("nan")), base, tmp_path / "m")
    assert "is finite; choose another method" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "config.json makes no model in transformers"),
        (
            {"intermediate_size": 128},
            "model.layers.0.mlp.down_proj.weight is 96 × 160, and config.json asks for 96 × 128",
        ),
        ({"num_hidden_layers": 6}, "model.layers.5.input_layernorm.weight is missing, and config.json asks for 96"),
        ({"num_hidden_layers": 4}, "model.layers.4.input_layernorm.weight is 96, and config.json asks for missing"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing, and config.json asks for 320 × 96"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "NaN or infinite"),
    ],
)
def test_what_stock_transformers_would_not_load_is_refused(pico_llama, tmp_path, changes, said):
    base = Checkpoint.read(pico_llama)
    with pytest.raises(CheckpointError) as caught:
        loading.write_checked(dataclasses.replace(base, config={**base.config, **changes}), tmp_path / "m", base, None)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_model_loads(pico, tmp_path):
    base = Checkpoint.read(pico)
    plan = dataclasses.replace(CompressionPlan.identity(base.config), num_hidden_layers=3, intermediate_size=96)
    loading.write_checked(build.shapes(plan, base, family.family_of(base)), tmp_path / "m", base, None)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["num_hidden_layers"] == 3


def test_the_error_crosses_a_process(pico_llama):
    error = pickle.loads(pickle.dumps(NotFiniteWeights("a b", "a")))
    assert str(error) == "a b"
