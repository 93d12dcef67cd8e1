"""Test the choices of methods, the grids of schemes, and the reasons of infeasible plans."""

import dataclasses
import json

import pytest
import torch

from compressors import build
from compressors.errors import InfeasiblePlan
from compressors.methods import depth, heads, precision
from compressors.methods.quantizers import nearest
from compressors.model import family
from compressors.model.checkpoint import Checkpoint
from compressors.plan import CompressionPlan
from compressors.statistics.activations import Calibration
from evaluator import backends


def statistics(influence):
    empty = torch.zeros(0)
    return Calibration(torch.tensor(influence), empty, empty, empty, {})


def test_depth_drops_the_least_influential_or_from_an_end():
    found = statistics([0.9, 0.1, 0.5, 0.05, 0.7])
    assert depth.choose(5, 3, "importance", found) == (0, 2, 4)
    assert depth.choose(5, 3, "top", None) == (0, 1, 2)
    assert depth.choose(5, 3, "bottom", None) == (2, 3, 4)
    assert depth.choose(5, 5, "importance", None) == (0, 1, 2, 3, 4)
    with pytest.raises(InfeasiblePlan, match="6 of 5"):
        depth.choose(5, 6, "top", None)
    with pytest.raises(InfeasiblePlan, match="calibrate"):
        depth.choose(5, 3, "importance", None)


def test_heads_keep_whole_groups_and_the_same_number_in_each():
    activity = [0.1, 0.2, 9.0, 0.1, 3.0, 4.0]  # groups (0, 1), (2, 3), (4, 5): energies 0.05, 81.01, 25
    assert heads.choose(6, 3, 4, 2, activity) == ((1, (2, 3)), (2, (4, 5)))
    assert heads.choose(6, 3, 2, 2, activity) == ((1, (2,)), (2, (5,)))
    assert heads.choose(6, 3, 3, 3, activity) == ((0, (1,)), (1, (2,)), (2, (5,)))


@pytest.mark.parametrize(
    ("keep_heads", "keep_groups", "said"),
    [
        (5, 2, "5 query heads can't be shared by 2 key/value heads; choose a multiple of 2"),
        (6, 2, "at most 4 query heads"),
        (4, 4, "4 key/value heads can't be kept of 3"),
        (0, 1, "0 query heads can't be kept"),
    ],
)
def test_head_counts_that_can_not_be(keep_heads, keep_groups, said):
    assert said in heads.infeasible(6, 3, keep_heads, keep_groups)
    with pytest.raises(InfeasiblePlan):
        heads.choose(6, 3, keep_heads, keep_groups, [1.0] * 6)


@pytest.mark.parametrize(("scheme", "size", "steps"), [("W8A8", None, 255), ("W4A16", 32, 15)])
def test_rounding_is_to_the_nearest_of_an_even_grid(scheme, size, steps):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scale = nearest.round_weight(weight, None, scheme, size)
    assert values.abs().max() <= (steps + 1) / 2
    assert torch.equal(values, values.round())
    groups = weight.float().reshape(6, scale.shape[1], -1)
    error = (groups - values.reshape(groups.shape) * scale.float()[..., None]).abs()
    inside = groups.abs() <= scale.float()[..., None] * ((steps - 1) / 2)
    assert (error <= 0.5001 * scale.float()[..., None])[inside].all()
    assert error.max() > 0


def test_a_row_of_zeros_stays_zeros():
    for scheme, size in (("W8A8", None), ("FP8_DYNAMIC", None), ("W4A16", 32)):
        values, scale = nearest.round_weight(torch.zeros(2, 32).bfloat16(), None, scheme, size)
        assert not values.any()
        assert torch.isfinite(scale.float()).all()


def test_stored_formats(pico_llama):
    base = Checkpoint.read(pico_llama)
    its_family = family.family_of(base)
    name = "model.layers.0.mlp.up_proj"
    made = precision.quantize(base, its_family, "W8A8").tensors
    assert made[f"{name}.weight"].load().dtype == torch.int8
    assert made[f"{name}.weight_scale"].load().shape == (160, 1)
    made = precision.quantize(base, its_family, "FP8_DYNAMIC").tensors
    assert made[f"{name}.weight"].load().dtype == torch.float8_e4m3fn
    with pytest.raises(InfeasiblePlan, match="32"):  # o_proj reads 6 · 24 = 144 inputs
        precision.quantize(base, its_family, "W4A16")
    assert "lm_head.weight" not in made
    assert made["model.embed_tokens.weight"].dtype == torch.bfloat16


def check(base, alignment=True, **changes):
    plan = dataclasses.replace(CompressionPlan.identity(base.config), **changes)
    return build.check(
        plan, base, family.family_of(base), kernels=backends.kernels("vllm", "cuda") if alignment else None
    )


def test_infeasible_plans_say_why(pico_llama):
    base = Checkpoint.read(pico_llama)
    assert check(base) is None
    assert "num_hidden_layers: 6" in check(base, num_hidden_layers=6)
    assert "multiple of 2" in check(base, num_attention_heads=5, num_key_value_heads=2)
    assert "input width" in check(base, precision="W4A16")
    assert "hidden_size: 0" in check(base, hidden_size=0)
    assert "intermediate_size: 161" in check(base, intermediate_size=161)
    assert "drop_from: 'middle'" in check(base, num_hidden_layers=3, drop_from="middle")
    assert "precision: 'INT2'" in check(base, precision="INT2")
    for scheme in ("W8A8", "FP8_DYNAMIC"):
        assert check(base, precision=scheme) is None
        assert "q_proj+k_proj+v_proj is 288 × 72" in check(base, precision=scheme, hidden_size=72)
        reason = check(base, precision=scheme, intermediate_size=150)  # gate+up: 300 × 96
        assert "gate_proj+up_proj is 300 × 96" in reason
        assert "CUTLASS" in reason
    assert check(base, alignment=False, precision="W8A8", intermediate_size=150) is None
    assert "Marlin" in check(base, precision="W4A16", num_attention_heads=4, num_key_value_heads=2)
    assert "transformers refuses" in check(base, alignment=False, hidden_size=64)  # Llama: 64 % 6


@pytest.mark.parametrize(("width", "said"), [(192, "down_proj is 256 × 192"), (128, None), (256, None)])
def test_marlin_wants_inputs_by_128(tmp_path, write_pico_model, width, said):
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    base = Checkpoint.read(write_pico_model(tmp_path / "m", "llama", intermediate_size=width, **sizes))
    reason = check(base, precision="W4A16")
    assert reason is None if said is None else said in reason
    assert check(base, alignment=False, precision="W4A16") is None


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "W4A16"])
def test_scales_and_values_are_those_of_compressed_tensors(scheme):
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = preset_name_to_scheme(scheme, ["Linear"]).weights
    size = 32 if scheme == "W4A16" else None
    args.group_size = size
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    groups = weight.reshape(6, -1, size or 64)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    values, own_scale = nearest.round_weight(weight, None, scheme, size)
    torch.testing.assert_close(own_scale, scale, rtol=1e-6, atol=0)
    expected = quantize(weight, own_scale, zero_point, args).float()
    assert torch.equal(values, expected)


def test_a_head_size_that_attention_kernels_refuse(tmp_path, write_pico_model):
    base = Checkpoint.read(write_pico_model(tmp_path / "m", "llama", head_dim=20))
    assert "head_dim: 20 is no multiple of 8" in check(base)
    assert check(base, alignment=False) is None


def test_a_config_without_head_dim_keeps_it_when_the_width_is_cut(tmp_path, write_pico_model):
    path = write_pico_model(tmp_path / "m", "llama", head_dim=16)  # 96 / 6
    config = json.loads((path / "config.json").read_text())
    for said in ({}, {"head_dim": None}):
        (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "head_dim"} | said))
        base = Checkpoint.read(path)
        its_family = family.family_of(base)
        for changes in ({"hidden_size": 72}, {"num_attention_heads": 3}, {"num_hidden_layers": 3}):
            plan = dataclasses.replace(CompressionPlan.identity(base.config), **changes)
            assert check(base, **changes) is None
            made = build.apply(plan, base, its_family, None)
            assert made.config["head_dim"] == 16
            made.to_model("cpu")
            assert "head_dim" not in base.config or base.config["head_dim"] is None, "the base is not changed"


@pytest.mark.parametrize(("width", "expected"), [(128, 128), (192, 64), (160, 32)])
def test_w4a16_takes_the_largest_group_that_divides_every_width(tmp_path, write_pico_model, width, expected):
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64}
    base = Checkpoint.read(write_pico_model(tmp_path / "m", "llama", intermediate_size=width, **sizes))
    its_family = family.family_of(base)
    assert precision.group_size(base, its_family) == expected
    made = precision.quantize(base, its_family, "W4A16")
    weights = made.config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert weights["group_size"] == expected
    down = "model.layers.0.mlp.down_proj"
    assert made.tensors[f"{down}.weight_packed"].load().shape == (384, width // 8)
    assert made.tensors[f"{down}.weight_scale"].load().shape == (384, width // expected)
    assert made.tensors[f"{down}.weight_shape"].load().tolist() == [384, width]
