"""Test the options of schemes: what is written, what stock transformers computes from it, what is refused."""

import json
from collections import Counter

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from packaging.version import Version
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compressors.errors import InfeasiblePlan
from compressors.methods import precision, quantizers, rounding, sensitivity
from compressors.methods.quantizers import nearest
from compressors.model import family
from compressors.model.checkpoint import Checkpoint
from compressors.plan import CompressionPlan, why_choices_clash

F32 = torch.float32
WIDE = {"hidden_size": 192, "head_dim": 32, "intermediate_size": 128}  # widths 192 and 128: groups of 64 and 32


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, 320, (3, 40), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=["llama", "exaone4"])
def wide(request, tmp_path_factory, write_pico_model):
    return Checkpoint.read(write_pico_model(tmp_path_factory.mktemp("wide") / "m", request.param, **WIDE))


@pytest.fixture(scope="module")
def its_family(wide):
    return family.family_of(wide)


@pytest.fixture(scope="module")
def moments(wide, its_family, windows):
    return moments_of(wide, its_family, windows)


def moments_of(checkpoint, its_family, windows):
    """Second moments of every projection's input, from a plain run."""
    model, seen = checkpoint.to_model("cpu", F32), {}
    for name in precision.linears(checkpoint, its_family):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2))
        )
    logits(model, windows)
    return {name: x.T @ x / len(x) for name, x in seen.items()}


def logits(model, windows):
    with torch.inference_mode():
        return model(torch.tensor(windows), use_cache=False).logits


def stock(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype=F32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


KEPT = ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "model.layers.4.self_attn.o_proj")
OPTIONS = {
    "W4A16, groups of 32": ("W4A16", {"group_size": 32}),
    "W4A16, mse": ("W4A16", {"quantizer": "mse"}),
    "W4A16, gptq": ("W4A16", {"quantizer": "gptq", "group_size": 64}),
    "W4A16, all of it": ("W4A16", {"quantizer": "gptq", "group_size": 32, "keep": KEPT, "lm_head_8bit": True}),
    "W8A8, gptq": ("W8A8", {"quantizer": "gptq"}),
    "W8A8, mse, kept, lm_head": ("W8A8", {"quantizer": "mse", "keep": KEPT, "lm_head_8bit": True}),
    "FP8, gptq, lm_head": ("FP8_DYNAMIC", {"quantizer": "gptq", "lm_head_8bit": True}),
    "FP8, mse, kept": ("FP8_DYNAMIC", {"quantizer": "mse", "keep": KEPT}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_stock_transformers_computes_what_the_simulation_does(name, wide, its_family, moments, windows, tmp_path):
    scheme, options = OPTIONS[name]
    made = precision.quantize(wide, its_family, scheme, moments=moments.__getitem__, **options)
    made.write(tmp_path / "m")
    simulated = precision.simulate(wide, its_family, scheme, moments=moments.__getitem__, **options)
    served = logits(stock(tmp_path / "m"), windows)
    torch.testing.assert_close(logits(simulated.to_model("cpu", F32), windows), served, atol=1e-4, rtol=1e-4)
    nearest = precision.simulate(wide, its_family, scheme)
    assert (logits(nearest.to_model("cpu", F32), windows) - served).abs().max() > 0.01, "the options changed nothing"
    assert made.total_parameters == wide.total_parameters


@pytest.mark.parametrize("name", OPTIONS)
def test_what_the_simulation_rounded_is_not_rounded_again(name, wide, its_family, moments, monkeypatch, tmp_path):
    scheme, options = OPTIONS[name]
    apart = precision.quantize(wide, its_family, scheme, moments=moments.__getitem__, **options).write(tmp_path / "a")
    known = {}
    options = {**options, "moments": moments.__getitem__, "known": known}
    precision.simulate(wide, its_family, scheme, **options).to_model("cpu", F32)
    projections = {name for name in precision.linears(wide, its_family) if name not in options.get("keep", ())}
    assert known.keys() == projections
    assert {values.element_size() for values, _ in known.values()} == {1}
    rounded = []
    by = precision.quantizers.quantizer(options.get("quantizer", "nearest"))
    round_weight = by.round_weight

    def counted(weight, *others):
        rounded.append(tuple(weight.shape))
        return round_weight(weight, *others)

    monkeypatch.setattr(by, "round_weight", counted)
    assert precision.quantize(wide, its_family, scheme, **options).write(tmp_path / "b") == apart
    assert set(rounded) <= {tuple(wide.tensors["model.embed_tokens.weight"].shape)}  # lm_head alone
    assert not known
    assert precision.quantize(wide, its_family, scheme, **options).write(tmp_path / "c") == apart
    assert len(rounded) >= len(projections)  # nothing was left


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
def test_every_family_loads_with_every_option(pico, scheme, windows, tmp_path):
    base = Checkpoint.read(pico)
    its = family.family_of(base)
    keep = precision.fused_groups(base, its)[0]
    options = {"quantizer": "mse", "keep": keep, "lm_head_8bit": True}
    precision.quantize(base, its, scheme, kv_cache_fp8=its.fp8_cache, **options).write(tmp_path / "m")
    simulated = precision.simulate(base, its, scheme, **options).to_model("cpu", F32)
    served = stock(tmp_path / "m")
    assert served.config.tie_word_embeddings is False
    served, simulated = logits(served, windows), logits(simulated, windows)
    assert (served - simulated).abs().mean() < 0.5 * simulated.std(), "keys and values alone may be rounded too"


def test_what_is_kept_is_named_and_is_the_models_own(wide, its_family):
    made = precision.quantize(wide, its_family, "W8A8", keep=KEPT)
    config = made.config["quantization_config"]
    assert config["ignore"] == ["lm_head", *KEPT]
    for name in precision.linears(wide, its_family):
        stored = made.tensors[f"{name}.weight"]
        assert (stored.dtype == torch.bfloat16) == (name in KEPT)
        assert (f"{name}.weight_scale" in made.tensors) == (name not in KEPT)
    assert torch.equal(made.tensors[f"{KEPT[0]}.weight"].load(), wide.tensors[f"{KEPT[0]}.weight"].load())
    assert precision.simulate(wide, its_family, "W8A8", keep=KEPT).activations.keys().isdisjoint(KEPT)


def test_only_whole_fused_groups_are_kept(wide, its_family):
    with pytest.raises(InfeasiblePlan, match=r"gate_proj stays in 16 bits without model\.layers\.1\.mlp\.up_proj"):
        precision.quantize(wide, its_family, "W8A8", keep=KEPT[:1])
    with pytest.raises(InfeasiblePlan, match="lm_head is no projection"):
        precision.simulate(wide, its_family, "W8A8", keep=["lm_head"])
    with pytest.raises(InfeasiblePlan, match="all 20 projections"):
        precision.quantize(wide, its_family, "W8A8", keep=precision.linears(wide, its_family))


@pytest.mark.parametrize(("wanted", "size"), [(0, 64), (32, 32), (64, 64)])
def test_group_sizes(wide, its_family, wanted, size):
    made = precision.quantize(wide, its_family, "W4A16", group_size=wanted)
    assert made.config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == size
    down = its_family.in_layer(3, its_family.down)
    assert made.tensors[f"{down}.weight_scale"].load().shape == (192, 128 // size)


def test_a_group_size_that_does_not_fit(wide, its_family):
    with pytest.raises(InfeasiblePlan, match=r"group_size: 128 does not divide every input width of \[128, 192\]"):
        precision.quantize(wide, its_family, "W4A16", group_size=128)
    down = {its_family.in_layer(layer, its_family.down) for layer in range(5)}  # alone reads 128 inputs
    keep = [name for name in precision.linears(wide, its_family) if name not in down]
    made = precision.quantize(wide, its_family, "W4A16", group_size=128, keep=keep)
    assert made.config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 128


def test_each_weight_is_rounded_once_when_it_is_written(wide, its_family, moments, tmp_path):
    asked = Counter()

    def counted(name):
        asked[name] += 1
        return moments[name]

    made = precision.quantize(wide, its_family, "W4A16", quantizer="gptq", moments=counted)
    assert not asked, "nothing is computed before it is written"
    made.write(tmp_path / "m")
    assert asked == dict.fromkeys(precision.linears(wide, its_family), 1)


def test_gptq_without_second_moments(wide, its_family):
    made = precision.quantize(wide, its_family, "W8A8", quantizer="gptq")  # shapes are right, for a plan's size
    assert made.size_bytes == precision.quantize(wide, its_family, "W8A8").size_bytes
    with pytest.raises(InfeasiblePlan, match="gptq needs second moments"):
        made.tensors["model.layers.0.mlp.up_proj.weight"].load()


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC", "W8A16"])
def test_searched_scales_lose_no_more_than_the_largest(scheme):
    random = torch.Generator().manual_seed(4)
    weight = (torch.randn(40, 128, generator=random) * torch.rand(40, 128, generator=random)).bfloat16()
    counts = torch.rand(128, generator=random) ** 4
    size = 32 if scheme == "W4A16" else None

    def error(scales, importance):
        made = rounding.multiplied_out(rounding.nearest(weight, scales, scheme), scales)
        by_group = ((made - weight).square() * importance).reshape(*scales.shape, -1)
        return by_group.sum(-1)

    ones, largest = torch.ones(128), rounding.largest_scales(weight, scheme, size)
    plain = rounding.searched_scales(weight, scheme, size)
    weighted = rounding.searched_scales(weight, scheme, size, counts)
    assert (error(plain, ones) <= error(largest, ones) * 1.0001).all()
    if scheme == "W4A16":
        assert error(plain, ones).sum() < 0.99 * error(largest, ones).sum()
    assert error(weighted, counts).sum() <= error(plain, counts).sum()
    chunked = torch.cat([rounding.searched_scales(part, scheme, size, counts) for part in weight.split(7)])
    assert torch.equal(chunked, weighted)


def test_zeros_stay_zeros():
    for scheme in ("W8A8", "FP8_DYNAMIC", "W4A16"):
        for quantizer in quantizers.names():
            values, scales = quantizers.quantizer(quantizer).round_weight(
                torch.zeros(2, 32).bfloat16(), lambda: torch.eye(32), scheme, 32 if scheme == "W4A16" else None
            )
            assert not values.any()
            assert torch.isfinite(scales.float()).all()


# -- lm_head -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_an_8_bit_lm_head_is_apart_from_the_embedding(tmp_path, write_pico_model, tied):
    base = Checkpoint.read(write_pico_model(tmp_path / "m", "llama", tie_word_embeddings=tied, **WIDE))
    its = family.family_of(base)
    source = base.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"].load()
    for scheme in ("W8A8", "W4A16"):
        made = precision.quantize(base, its, scheme, lm_head_8bit=True)
        assert made.config["tie_word_embeddings"] is False
        embedding = made.tensors["model.embed_tokens.weight"].load()
        assert torch.equal(embedding, base.tensors["model.embed_tokens.weight"].load())
        config = made.config["quantization_config"]
        assert config["ignore"] == []
        groups = config["config_groups"]
        (by,) = [group for group in groups.values() if "lm_head" in group["targets"]]
        assert by["weights"]["num_bits"] == 8
        assert by["weights"]["strategy"] == "channel"
        scales = made.tensors["lm_head.weight_scale"].load().float()
        if scheme == "W8A8":
            values = made.tensors["lm_head.weight"].load()
            assert list(groups) == ["group_0"]
        else:
            packed = made.tensors["lm_head.weight_packed"]
            assert packed.shape == (320, 192 // 4)
            values = unpack_from_int32(packed.load(), 8, torch.Size((320, 192)))
            assert by["input_activations"] is None
            assert groups["group_0"]["weights"]["num_bits"] == 4
        assert values.dtype == torch.int8
        assert (values.float() * scales - source.float()).abs().max() <= 0.51 * scales.max()
        json.dumps(made.config)


# -- the cache -----------------------------------------------------------------------------------------------


def test_an_fp8_cache_is_written_as_stock_transformers_reads_it(wide, its_family, windows, tmp_path):
    made = precision.quantize(wide, its_family, "W8A8", kv_cache_fp8=True)
    scheme = made.config["quantization_config"]["kv_cache_scheme"]
    expected = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    assert expected.items() <= scheme.items()
    scales = [name for name in made.tensors if name.endswith(("k_scale", "v_scale"))]
    assert len(scales) == 2 * 5
    assert all(made.tensors[name].load() == 1 for name in scales)
    made.write(tmp_path / "m")

    def rounding_cache(module, query, key, value, *args, **kwargs):
        key, value = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("rounding_cache", rounding_cache)
    model = precision.simulate(wide, its_family, "W8A8").to_model("cpu", F32)
    plain = logits(model, windows)
    model.set_attn_implementation("rounding_cache")
    served = logits(stock(tmp_path / "m"), windows)
    rounded = logits(model, windows)
    assert (plain - rounded).abs().max() > 0.01
    # transformers 5.23 rounds what a compressed-tensors model caches, and 5.24 leaves that to the engine
    rounds = Version(transformers.__version__) < Version("5.24")
    torch.testing.assert_close(rounded if rounds else plain, served, atol=1e-3, rtol=1e-3)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precision": "bfloat16"}, None),
        ({"precision": "W8A8", "quantizer": "gptq", "keep_16_bit": 3, "lm_head": "8-bit", "kv_cache": "fp8"}, None),
        ({"precision": "W4A16", "group_size": 64}, None),
        ({"precision": "bfloat16", "quantizer": "gptq"}, "quantizer: gptq goes with a scheme, and bfloat16"),
        ({"precision": "float32", "group_size": 64}, "group_size: 64 goes with a scheme"),
        ({"precision": "float16", "keep_16_bit": 1}, "keep_16_bit: 1 goes with a scheme"),
        ({"precision": "bfloat16", "lm_head": "8-bit"}, "lm_head: 8-bit goes with a scheme"),
        ({"precision": "bfloat16", "kv_cache": "fp8"}, "kv_cache: fp8 goes with a scheme"),
        ({"precision": "W8A8", "group_size": 64}, "group_size: 64 is of W4A16 alone"),
        ({"precision": "W4A16", "group_size": 48}, "group_size: 48 is not one of 0, 32, 64, 128"),
        ({"precision": "W4A16", "quantizer": "awq"}, "quantizer: 'awq' is not one of nearest, mse, gptq"),
        ({"precision": "W4A16", "keep_16_bit": -1}, "keep_16_bit: -1"),
        ({"precision": "W4A16", "lm_head": "4-bit"}, "lm_head: '4-bit' is not one of 16-bit, 8-bit"),
        ({"precision": "W4A16", "kv_cache": "int8"}, "kv_cache: 'int8' is not one of auto, fp8"),
    ],
)
def test_options_that_do_not_go_together(options, reason):
    found = why_choices_clash(CompressionPlan(4, 6, 3, 96, 160, **options))
    assert found is None if reason is None else found.startswith(reason), found
    assert found is None or "\n" not in found


# -- sensitivity ---------------------------------------------------------------------------------------------


def test_damage_is_the_relative_error_of_the_output():
    random = torch.Generator().manual_seed(5)
    x = torch.randn(4000, 64, generator=random) @ torch.randn(64, 64, generator=random)
    weight = torch.randn(24, 64, generator=random).bfloat16()
    for scheme, size in (("W4A16", 32), ("W8A8", None), ("FP8_DYNAMIC", None)):
        values, scales = nearest.round_weight(weight, None, scheme, size)
        if scheme == "W8A8":
            step = x.abs().amax(1, keepdim=True) / 127.5
            rounded = (x / step).round() * step
        elif scheme == "FP8_DYNAMIC":
            step = x.abs().amax(1, keepdim=True) / 448
            rounded = (x / step).to(torch.float8_e4m3fn).float() * step
        else:
            rounded = x
        exact = x @ weight.float().T
        error = rounded @ rounding.multiplied_out(values, scales).T - exact
        measured = float(error.square().sum() / exact.square().sum())
        assert sensitivity.damage(weight, x.T @ x / len(x), scheme, size) == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC"])
def test_every_fused_group_is_ranked_and_the_broken_one_first(scheme, wide, its_family, moments):
    groups = precision.fused_groups(wide, its_family)
    assert sensitivity.rank(wide, its_family, scheme, moments.__getitem__) != groups
    broken = groups[14]  # gate and up of layer 3
    spiky = dict(wide.tensors)
    spiky[f"{broken[1]}.weight"] = spiky[f"{broken[1]}.weight"].map(lambda weight: weight.index_fill(1, SPIKE, 30.0))
    unread = {**moments, broken[1]: moments[broken[1]].clone()}
    unread[broken[1]][SPIKE] = unread[broken[1]][:, SPIKE] = 0  # a column that sets the scale and that no input uses
    order = sensitivity.rank(_with(wide, spiky), its_family, scheme, unread.__getitem__)
    assert sorted(order) == sorted(groups)
    assert order[0] == broken if scheme != "FP8_DYNAMIC" else broken in order  # floating point has no step to spoil


SPIKE = torch.tensor([17])


def _with(checkpoint, tensors):
    return Checkpoint(checkpoint.config, tensors, checkpoint.files)
