"""Smoothed inputs: the same model, whose channels a scheme's grids lose less of."""

import dataclasses

import pytest
import torch

from compressors import build, calibration, family, moments
from compressors.checkpoint import Checkpoint
from compressors.methods import precision, smoothing
from compressors.plan import CompressionPlan

FAMILIES = ["llama", "llama_untied", "qwen2", "qwen3", "smollm3", "exaone4", "gemma3_text"]
LOUD = (1, 5, 7)  # channels


@pytest.fixture(scope="module")
def texts():
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randint(3, 320, (4, 40), generator=draw).tolist() for name in ("one", "other")}


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path, write_pico_model):
    """In bfloat16; llama_untied has biases everywhere."""
    name = request.param.removesuffix("_untied")
    changes = {} if name == request.param else {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    base = Checkpoint.read(write_pico_model(tmp_path / "base", name, **changes))
    return with_loud_channels(base, family.family_of(base))


@pytest.fixture
def its(base):
    return family.family_of(base)


@pytest.fixture
def second(base, its, texts, tmp_path):
    return build._second_moments(its, moments.collect(base, texts, tmp_path / "moments"), {}, "cpu")


def logits(checkpoint, windows, dtype=torch.float32):
    with torch.inference_mode():
        return checkpoint.to_model("cpu", dtype)(torch.tensor(windows), use_cache=False).logits


def inputs_of(checkpoint, modules, windows):
    """Module → its inputs [tokens, K] in float32."""
    model, seen = checkpoint.to_model("cpu", torch.float32), {}
    for name in modules:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen.update({name: given[0].flatten(0, -2)})
        )
    with torch.inference_mode():
        model(torch.tensor(windows), use_cache=False)
    return seen


def with_loud_channels(base, its):
    """The same model with very uneven inputs: what makes them has some channels 64 times as loud, and what reads them
    makes up for it."""
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
    if its.norm_offset:  # gains beside an offset are rounded, and their readers' weights by what they were rounded to
        assert (found - expected).float().square().mean() < 1e-3 * expected.float().square().mean()
    else:
        assert torch.equal(found, expected)
    for layer in range(base.config["num_hidden_layers"]):
        for part in (its.v, its.o, its.up, its.down, *its.input_norms, *its.input_norms.values()):
            name = f"{its.in_layer(layer, part)}.weight"
            assert not torch.equal(base.tensors[name].load(), smooth.tensors[name].load()), name
    assert smooth.config == base.config


def test_the_moments_are_those_of_its_inputs(base, its, second, texts):
    smooth, of_smooth = smoothing.smooth(base, its, second)
    modules = precision.linears(base, its)
    before, after = (inputs_of(model, modules, texts["one"]) for model in (base, smooth))
    for module in modules:
        change = (after[module].square().mean(0) / before[module].square().mean(0)).nan_to_num(1.0)
        expected = second(module).diagonal() * change
        assert torch.allclose(of_smooth(module).diagonal(), expected, rtol=1e-2), module
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
    assert float(smoothing.best_factors(torch.tensor([1e30, 1e-30]), torch.ones(2)).max()) == 2**smoothing.MOST


@pytest.mark.parametrize("base", ["llama", "exaone4", "gemma3_text"], indirect=True)
@pytest.mark.parametrize("quantizer", ["nearest", "gptq"])
def test_loud_channels_make_the_others_no_coarser(base, its, texts, tmp_path, quantizer):
    its_moments = moments.collect(base, texts, tmp_path / "loud")
    statistics = calibration.calibrate(base, texts["one"])
    expected = logits(base, texts["other"]).log_softmax(-1)

    def lost(how):
        plan = dataclasses.replace(CompressionPlan.identity(base.config), precision="W8A8", quantizer=quantizer, **how)
        made = build.apply(plan, base, its, statistics, moments=its_moments, simulate=True)
        found = logits(made, texts["other"]).log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    assert lost({"smoothing": "smoothquant"}) < 0.2 * lost({})


@pytest.mark.parametrize("base", ["llama_untied", "gemma3_text", "exaone4"], indirect=True)
def test_written_it_is_what_was_scored(base, its, texts, tmp_path):
    """Cut, repaired, smoothed and rounded: the checkpoint multiplied out is the model that is scored in memory."""
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
    its_moments = moments.collect(base, texts, tmp_path / "moments")
    statistics = calibration.calibrate(base, texts["one"])
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
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_it_goes_with_w8a8(base, its, chosen, said):
    plan = dataclasses.replace(CompressionPlan.identity(base.config), precision=chosen, smoothing="smoothquant")
    assert build.check(plan, base, its, kernel_alignment=False, max_bytes=None) == said
