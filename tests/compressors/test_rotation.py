"""Test the residual stream in the basis of its principal components: the same model, and the cut that loses least."""

import dataclasses

import pytest
import torch

from compressors import build
from compressors.methods import rotation
from compressors.model import family
from compressors.model.checkpoint import Checkpoint
from compressors.plan import CompressionPlan
from compressors.statistics import activations, second_moments

RANK = 64  # of 96 dimensions


@pytest.fixture(scope="module")
def texts():
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randint(3, 320, (4, 40), generator=draw).tolist() for name in ("one", "other")}


FAMILIES = [*family.names(), "llama_untied"]


@pytest.fixture(params=["qwen2", "exaone4"])
def base(request, tmp_path, write_pico_model):
    """llama_untied has biases everywhere, a cut qwen2 becomes a Llama, exaone4 and gemma3 have norms after blocks."""
    return Checkpoint.read(write_pico_model(tmp_path / "base", request.param, dtype="float32"))


@pytest.fixture
def its(base):
    return family.family_of(base)


def logits(checkpoint, windows):
    with torch.inference_mode():
        return checkpoint.to_model("cpu", torch.float32)(torch.tensor(windows), use_cache=False).logits


def lost(checkpoint, expected, windows):
    return float((logits(checkpoint, windows) - expected).square().mean() / expected.square().mean())


def with_even_gains(base, its):
    """Give each norm after a block a single gain for all dimensions, which differs between norms."""
    tensors = dict(base.tensors)
    for layer in range(base.config["num_hidden_layers"]):
        for norm in its.output_norms.values():
            name = f"{its.in_layer(layer, norm)}.weight"
            tensors[name] = tensors[name].map(lambda w, layer=layer: torch.full_like(w, 0.3 + 0.1 * layer))
    return dataclasses.replace(base, tensors=tensors)


def of_low_rank(base, its):
    """Return the model with a residual stream of rank RANK, along none of its own dimensions."""
    E = base.config["hidden_size"]
    part = torch.linalg.qr(torch.randn(E, RANK, generator=torch.Generator().manual_seed(5)))[0]
    project, tensors = part @ part.T, dict(base.tensors)
    tensors[f"{its.embedding}.weight"] = tensors[f"{its.embedding}.weight"].map(lambda w: w @ project)
    for layer in range(base.config["num_hidden_layers"]):
        for name in (its.in_layer(layer, its.o), its.in_layer(layer, its.down)):
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].map(lambda w: project @ w)
            if f"{name}.bias" in tensors:
                tensors[f"{name}.bias"] = tensors[f"{name}.bias"].map(lambda b: project @ b)
    return dataclasses.replace(base, tensors=tensors)


@pytest.mark.parametrize("base", FAMILIES, indirect=True)
def test_a_rotated_model_computes_the_same(base, its, texts, tmp_path):
    even = with_even_gains(base, its)
    turned = rotation.turn(even, its, rotation.principal(even, its, texts, tmp_path))
    assert lost(turned, logits(even, texts["one"]), texts["one"]) < 1e-8
    assert turned.config["tie_word_embeddings"] is False
    assert turned.tensors.keys() == base.tensors.keys() | {"lm_head.weight"}


@pytest.mark.parametrize("base", ["exaone4", "gemma3_text"], indirect=True)
def test_uneven_gains_after_a_block_are_corrected_in_the_mean(base, its, texts, tmp_path):
    found = rotation.principal(base, its, texts, tmp_path)
    turned = rotation.turn(base, its, found)
    expected = logits(base, texts["one"])
    as_it_is = lost(turned, expected, texts["one"])
    assert as_it_is < 0.1
    for wrong in (0.9, 1.1):  # no other size of the gains after blocks is better
        tensors = dict(turned.tensors)
        for layer in range(base.config["num_hidden_layers"]):
            for norm in its.output_norms.values():
                name = f"{its.in_layer(layer, norm)}.weight"
                offset = its.norm_offset
                tensors[name] = tensors[name].map(lambda w, by=wrong, offset=offset: (w + offset) * by - offset)
        assert lost(dataclasses.replace(turned, tensors=tensors), expected, texts["one"]) > as_it_is


def test_principal_components_are_orthonormal_and_hold_the_whole_stream(base, its, texts, tmp_path):
    said = []
    found = rotation.principal(base, its, texts, tmp_path, say=said.append)
    E, layers = base.config["hidden_size"], base.config["num_hidden_layers"]
    assert torch.allclose(found.basis.T @ found.basis, torch.eye(E), atol=1e-5)
    assert set(found.mean_square) == set(its.residual_norms(layers))
    before = {its.in_layer(layer, norm) for layer in range(layers) for norm in its.input_norms.values()}
    for name in (*before, its.final_norm):  # the mean square of x̂ is 1 in every basis
        assert found.mean_square[name].sum() == pytest.approx(E, rel=1e-3)
    assert len(said) == layers
    again = rotation.principal(base, its, texts, tmp_path, say=said.append)
    assert torch.equal(again.basis, found.basis)
    assert len(said) == layers  # the second call reads the file


def test_a_stream_of_few_dimensions_loses_nothing_when_cut_to_them(base, its, texts, tmp_path):
    few = of_low_rank(with_even_gains(base, its), its)
    windows = [window for those in texts.values() for window in those]
    statistics = activations.calibrate(few, windows)
    moment = second_moments.collect(few, texts, tmp_path / "moments")
    keep = RANK + -RANK % base.config["num_attention_heads"]  # some configs require a multiple of the heads
    plan = dataclasses.replace(CompressionPlan.identity(base.config), hidden_size=keep)
    expected = logits(few, texts["one"])

    def built(**options):
        return build.apply(dataclasses.replace(plan, **options), few, its, statistics, moments=moment)

    assert lost(built(), expected, texts["one"]) > 1e-2
    for repair in ("none", "ridge", "stream"):
        made = built(rotation="pca", repair=repair)
        assert made.config["hidden_size"] == keep
        assert lost(made, expected, texts["one"]) < 1e-4


def test_second_moments_of_the_base_give_those_of_the_rotated_model(base, its, texts, tmp_path):
    even = with_even_gains(base, its)
    found = rotation.principal(even, its, texts, tmp_path)
    of_base = second_moments.collect(even, texts, tmp_path / "base-moments")
    changed = dataclasses.replace(of_base, change=rotation.of_inputs(even, its, found.basis)).of_layers((1, 3))
    turned = rotation.turn(even, its, found)
    collected = second_moments.collect(turned, texts, tmp_path / "turned-moments").of_layers((1, 3))
    for part in (its.q, its.o, its.gate, its.down):
        for domain, expected in collected.of(1, part).items():
            moment = changed.of(1, part)[domain]
            # tokens are clipped by their length, which depends on the gains: that explains a small difference
            assert (moment.second - expected.second).norm() < 0.05 * expected.second.norm(), part
            assert moment.tokens == expected.tokens


@pytest.mark.parametrize("base", ["gemma3_text"], indirect=True)
def test_the_predicted_size_counts_the_lm_head_that_a_rotation_unties(base, its, texts, tmp_path):
    windows = [window for those in texts.values() for window in those]
    plan = dataclasses.replace(
        CompressionPlan.identity(base.config), hidden_size=72, precision="W8A8", quantizer="gptq", rotation="pca"
    )
    assert build.needs_moments(plan)
    moment = second_moments.collect(base, texts, tmp_path / "moments")
    made = build.apply(plan, base, its, activations.calibrate(base, windows), moments=moment)
    made.write(tmp_path / "made")
    assert (tmp_path / "made" / "model.safetensors").stat().st_size == build.predicted_bytes(plan, base, its)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("base", ["llama_untied", "exaone4"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"repair": "ridge"}, {"repair": "stream"}], ids=["cut", "ridge", "stream"])
def test_a_gpu_builds_the_same_model(base, its, texts, tmp_path, options):
    windows = [window for those in texts.values() for window in those]
    plan = dataclasses.replace(CompressionPlan.identity(base.config), hidden_size=72, rotation="pca", **options)
    made = {}
    for device in ("cpu", "cuda"):
        statistics = activations.calibrate(base, windows, device)
        moment = second_moments.collect(base, texts, tmp_path / device, device)
        made[device] = build.apply(plan, base, its, statistics, moments=moment, device=device)
    assert lost(made["cuda"], logits(made["cpu"], windows), windows) < 1e-5  # the sign of a component is arbitrary
