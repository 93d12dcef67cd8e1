"""Test smoothed inputs: the model computes the same, and a scheme's grids lose less of it."""

import dataclasses

import pytest
import torch

from compressors import build
from compressors.methods import precision, smoothing
from compressors.model import family
from compressors.model.checkpoint import Checkpoint, LazyTensor
from compressors.plan import CompressionPlan
from compressors.statistics import activations, second_moments
from compressors.steps import quantize

FAMILIES = [*family.names(), "llama_untied"]
LOUD = (1, 5, 7)  # channels


@pytest.fixture(scope="module")
def texts():
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randint(3, 320, (4, 40), generator=draw).tolist() for name in ("one", "other")}


@pytest.fixture(params=FAMILIES)
def quiet(request, tmp_path, write_pico_model):
    """The models in bfloat16; llama_untied has biases everywhere."""
    return Checkpoint.read(write_pico_model(tmp_path / "base", request.param))


@pytest.fixture
def base(quiet):
    return with_loud_channels(quiet, family.family_of(quiet))


@pytest.fixture
def its(base):
    return family.family_of(base)


@pytest.fixture
def second(base, its, texts, tmp_path):
    return quantize.second_moments(its, second_moments.collect(base, texts, tmp_path / "moments"), {}, "cpu")


def logits(checkpoint, windows, dtype=torch.float32):
    with torch.inference_mode():
        return checkpoint.to_model("cpu", dtype)(torch.tensor(windows), use_cache=False).logits


def inputs_of(checkpoint, modules, windows):
    """Return the inputs [tokens, K] of each module in float32."""
    model, seen = checkpoint.to_model("cpu", torch.float32), {}
    for name in modules:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen.update({name: given[0].flatten(0, -2)})
        )
    with torch.inference_mode():
        model(torch.tensor(windows), use_cache=False)
    return seen


def with_loud_channels(base, its):
    """Return the same model with some channels of its inputs 64 times as large, which their readers undo."""
    tensors, size = dict(base.tensors), family.head_dim(base.config)

    def by(width):
        factors = torch.ones(width)
        factors[list(LOUD)] = 64.0
        return factors

    def change(name, function):
        if name in tensors:
            tensors[name] = tensors[name].map(lambda w: function(w.float()).to(w.dtype))

    for layer in range(base.config["num_hidden_layers"]):
        for parts in its.fused:
            norm, maker = its.input_norms.get(parts[0]), {its.o: its.v, its.down: its.up}.get(parts[0])
            if norm is not None:
                name = f"{its.in_layer(layer, norm)}.weight"
                change(name, lambda w: (w + its.norm_offset) * by(len(w)) - its.norm_offset)
            elif maker is not None:
                width = size if maker == its.v else base.config["intermediate_size"]
                for kind, shape in (("weight", (-1, 1)), ("bias", (-1,))):
                    name = f"{its.in_layer(layer, maker)}.{kind}"
                    change(name, lambda w, width=width, s=shape: w * by(width).repeat(len(w) // width).reshape(s))
            else:
                continue
            for part in parts:
                width = size if part == its.o else tensors[f"{its.in_layer(layer, part)}.weight"].shape[1]
                name = f"{its.in_layer(layer, part)}.weight"
                change(name, lambda w, width=width: w / by(width).repeat(w.shape[1] // width))
    return dataclasses.replace(base, tensors=tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_the_same(base, its, second, texts, dtype):
    smooth, _ = smoothing.smooth(base, its, second)
    expected, found = logits(base, texts["one"], dtype), logits(smooth, texts["one"], dtype)
    if its.norm_offset:  # gains with an offset are rounded, and readers are multiplied by the rounded factor
        assert (found - expected).float().square().mean() < 1e-3 * expected.float().square().mean()
    else:
        assert torch.equal(found, expected)
    for layer in range(base.config["num_hidden_layers"]):
        for part in (its.v, its.o, its.up, its.down, *its.input_norms, *its.input_norms.values()):
            name = f"{its.in_layer(layer, part)}.weight"
            assert not torch.equal(base.tensors[name].load(), smooth.tensors[name].load()), name
    assert smooth.config == base.config


@pytest.mark.parametrize("quiet", ["llama_untied", "exaone4"], indirect=True)
def test_one_factor_for_all_query_heads_that_are_left_of_a_value(base, its, texts, tmp_path):
    own = CompressionPlan.identity(base.config)
    plan = dataclasses.replace(own, num_attention_heads=own.num_key_value_heads)
    assert plan != own
    cut = build.apply(plan, base, its, activations.calibrate(base, texts["one"]))
    second = quantize.second_moments(its, second_moments.collect(cut, texts, tmp_path / "moments"), {}, "cpu")
    smooth, _ = smoothing.smooth(cut, its, second)
    assert torch.equal(logits(smooth, texts["one"]), logits(cut, texts["one"]))
    name = f"{its.in_layer(0, its.o)}.weight"
    assert not torch.equal(smooth.tensors[name].load(), cut.tensors[name].load())


def test_gains_beside_an_offset_are_divided_by_what_is_stored():
    weight = torch.tensor([-0.98828125, 0.703125, -1.0, 63.0, -0.99609375], dtype=torch.bfloat16)
    wanted = torch.tensor([2.0, 64.0, 4.0, 0.25, 256.0])
    stored = LazyTensor(weight.shape, weight.dtype, lambda: weight)
    divided = smoothing._divided_gains(1.0, lambda: wanted, weight)
    factors = smoothing._of_gains(stored, 1.0, lambda: wanted)
    assert divided.dtype == weight.dtype
    assert torch.allclose((divided.float() + 1) * factors, weight.float() + 1, rtol=1e-6, atol=0)
    assert not torch.equal(factors[:2], wanted[:2])  # bfloat16 holds neither exactly
    assert factors[2] == 1.0  # the gain is 0: nothing to divide
    assert divided[4] == weight[4], "rounded to a gain of nothing, the input would be lost"
    assert factors[4] == 1.0


def test_the_moments_are_those_of_its_inputs(base, its, second, texts):
    smooth, of_smooth = smoothing.smooth(base, its, second)
    modules = precision.linears(base, its)
    before, after = (inputs_of(model, modules, texts["one"]) for model in (base, smooth))
    for module in modules:
        change = (after[module].square().mean(0) / before[module].square().mean(0)).nan_to_num(1.0)
        found, factors = of_smooth(module), change.sqrt()
        expected = second(module) * factors[:, None] * factors
        assert (found - expected).norm() < 1e-2 * expected.norm(), module
        assert torch.allclose(found, found.T, rtol=1e-5)
        assert torch.allclose(found.diagonal(), expected.diagonal(), rtol=1e-2), module
    readers = {its.q, its.k, its.v, its.gate, its.up}
    untouched = {module for module in modules if torch.equal(before[module], after[module])}
    alone = {module for module in modules if any(module.endswith(part) for part in readers)}
    assert untouched == (alone if not its.input_norms else set())


def test_no_other_factors_cost_less():
    draw = torch.Generator().manual_seed(1)
    square, weights = (torch.randn(64, generator=draw).mul(3).exp() for _ in range(2))
    square[3] = weights[7] = 0.0
    factors = smoothing.best_factors(square, weights)
    assert factors[3] == factors[7] == 1.0
    assert torch.equal(factors.log2(), factors.log2().round())

    def cost(those):
        return float((square / those**2).sum() * (those**2 * weights).sum())

    best = float((square * weights).sqrt().sum() ** 2)  # what Cauchy and Schwarz leave
    assert best <= cost(factors) < 1.25 * best < 0.1 * cost(torch.ones(64))
    live = (square > 0) & (weights > 0)
    assert abs(float(factors[live].log2().mean())) < 0.5
    for step in (0.5, 2.0):  # of any one channel
        for at in live.nonzero()[:, 0]:
            other = factors.clone()
            other[at] *= step
            assert cost(other) > 0.97 * cost(factors)  # roundings to powers of two are no optimum together
    assert torch.equal(smoothing.best_factors(torch.zeros(4), torch.ones(4)), torch.ones(4))
    clamped = smoothing.best_factors(torch.tensor([1e30, 1e-30]), torch.ones(2))
    assert clamped.tolist() == [2.0**smoothing.MOST, 2.0**-smoothing.MOST]


@pytest.mark.parametrize("quiet", ["llama", "exaone4", "gemma3_text"], indirect=True)
@pytest.mark.parametrize("quantizer", ["nearest", "gptq"])
def test_loud_channels_make_the_others_no_coarser(quiet, base, its, texts, tmp_path, quantizer):
    def lost(model, name, how):
        plan = dataclasses.replace(CompressionPlan.identity(model.config), precision="W8A8", quantizer=quantizer, **how)
        its_moments = second_moments.collect(model, texts, tmp_path / name)
        made = build.apply(
            plan, model, its, activations.calibrate(model, texts["one"]), moments=its_moments, simulate=True
        )
        expected, found = (logits(one, texts["other"]).log_softmax(-1) for one in (model, made))
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    smoothed = lost(base, "loud", {"smoothing": "smoothquant"})
    assert smoothed < 0.2 * lost(base, "loud", {})
    assert smoothed < 1.5 * lost(quiet, "quiet", {}), "as if they had never been"


@pytest.mark.parametrize("quiet", ["llama_untied", "gemma3_text", "exaone4"], indirect=True)
def test_written_it_is_what_was_scored(base, its, texts, tmp_path):
    """The dequantized checkpoint of a cut, repaired, smoothed and rounded model is what is scored in memory."""
    own = CompressionPlan.identity(base.config)
    plan = dataclasses.replace(
        own,
        intermediate_size=own.intermediate_size - 32,
        repair="stream",
        precision="W8A8",
        quantizer="gptq",
        smoothing="smoothquant",
        keep_16_bit=1,
    )
    its_moments = second_moments.collect(base, texts, tmp_path / "moments")
    statistics = activations.calibrate(base, texts["one"])
    simulated, written = (
        build.apply(plan, base, its, statistics, moments=its_moments, simulate=simulate) for simulate in (True, False)
    )
    for name, tensor in simulated.tensors.items():
        found = written.tensors[name].load().float()
        scale = written.tensors.get(f"{name}_scale")
        assert torch.equal(tensor.load().float(), found if scale is None else found * scale.load().float()), name
    versions = build.versions(plan)
    assert versions[-1] == f"smoothing {smoothing.VERSION}"
    assert len(versions) == 2
    assert build.needs_moments(dataclasses.replace(own, precision="W8A8", smoothing="smoothquant"))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (
            "bfloat16",
            "smoothing: smoothquant goes with a scheme, and bfloat16 quantises nothing; choose none, or one of W8A8, "
            "FP8_DYNAMIC, W4A16",
        ),
        (
            "FP8_DYNAMIC",
            "smoothing: smoothquant is of W8A8 alone, whose inputs are rounded to integers; with FP8_DYNAMIC it wins "
            "nothing; choose none",
        ),
    ],
)
@pytest.mark.parametrize("quiet", ["llama"], indirect=True)
def test_it_goes_with_w8a8(base, its, chosen, said):
    plan = dataclasses.replace(CompressionPlan.identity(base.config), precision=chosen, smoothing="smoothquant")
    assert build.check(plan, base, its, max_bytes=None) == said
