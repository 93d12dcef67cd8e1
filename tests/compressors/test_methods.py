import dataclasses

import pytest
import torch

from compressors import build, family
from compressors.calibration import Calibration
from compressors.checkpoint import Checkpoint
from compressors.errors import InfeasiblePlan
from compressors.methods import depth, heads, precision
from compressors.plan import CompressionPlan


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
    values, scale = precision.round_weight(weight, scheme, size)
    assert values.abs().max() <= (steps + 1) / 2
    assert torch.equal(values, values.round())
    groups = weight.float().reshape(6, scale.shape[1], -1)
    error = (groups - values.reshape(groups.shape) * scale.float()[..., None]).abs()
    inside = groups.abs() <= scale.float()[..., None] * ((steps - 1) / 2)
    assert (error <= 0.5001 * scale.float()[..., None])[inside].all()
    assert error.max() > 0


def test_a_row_of_zeros_stays_zeros():
    for scheme, size in (("W8A8", None), ("FP8_DYNAMIC", None), ("W4A16", 32)):
        values, scale = precision.round_weight(torch.zeros(2, 32).bfloat16(), scheme, size)
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
    return build.check(plan, base, family.family_of(base), kernel_alignment=alignment, max_bytes=None)


def test_infeasible_plans_say_why(pico_llama):
    base = Checkpoint.read(pico_llama)
    assert check(base) is None
    assert "num_hidden_layers: 6" in check(base, num_hidden_layers=6)
    assert "multiple of 2" in check(base, num_attention_heads=5, num_key_value_heads=2)
    assert "input width" in check(base, precision="W4A16")
    assert "CUTLASS" in check(base, precision="W8A8", intermediate_size=150)
    assert check(base, alignment=False, precision="W8A8", intermediate_size=150) is None
    assert "Marlin" in check(base, precision="W4A16", num_attention_heads=4, num_key_value_heads=2)
    assert "transformers refuses" in check(base, alignment=False, hidden_size=64)  # Llama: 64 % 6
