"""The residual stream in the basis of its principal components: the same model, and the cut that loses the least."""

import dataclasses

import pytest
import torch

from compressors import build, calibration, family, moments
from compressors.checkpoint import Checkpoint
from compressors.errors import InfeasiblePlan
from compressors.methods import rotation
from compressors.plan import CompressionPlan

RANK = 64  # of 96 dimensions


@pytest.fixture(scope="module")
def texts():
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randint(3, 320, (6, 40), generator=draw).tolist() for name in ("one", "other")}


TURNABLE = ["llama", "llama_untied", "qwen2", "qwen3", "smollm3"]


@pytest.fixture(params=["llama_untied", "qwen2"])  # biases everywhere; another architecture after the cut
def turnable(request, tmp_path, write_pico_model):
    name, _, untied = request.param.partition("_")
    changes = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True} if untied else {}
    return write_pico_model(tmp_path / "base", name, dtype="float32", **changes)


def logits(checkpoint, windows):
    with torch.inference_mode():
        return checkpoint.to_model("cpu", torch.float32)(torch.tensor(windows), use_cache=False).logits


def low_rank(base, its):
    """The model with a residual stream that keeps to RANK of its dimensions, none of them its own."""
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


@pytest.mark.parametrize("turnable", TURNABLE, indirect=True)
def test_in_any_basis_the_model_computes_the_same(turnable, texts):
    base = Checkpoint.read(turnable)
    its = family.family_of(base)
    E = base.config["hidden_size"]
    basis = torch.linalg.qr(torch.randn(E, E, generator=torch.Generator().manual_seed(2)))[0]
    turned = rotation.turn(base, its, basis)
    assert turned.config["tie_word_embeddings"] is False
    expected = logits(base, texts["one"])
    assert (logits(turned, texts["one"]) - expected).abs().max() < 2e-4 * expected.abs().max()
    assert turned.tensors.keys() == base.tensors.keys() | {"lm_head.weight"}


def test_principal_components_are_orthonormal_and_hold_the_whole_stream(turnable, texts, tmp_path):
    base = Checkpoint.read(turnable)
    its = family.family_of(base)
    said = []
    found = rotation.principal(base, its, texts, tmp_path, say=said.append)
    E, norms = base.config["hidden_size"], its.residual_norms(base.config["num_hidden_layers"])
    assert torch.allclose(found.basis.T @ found.basis, torch.eye(E), atol=1e-5)
    assert set(found.mean_square) == set(norms)
    for name in norms:  # the mean square of x̂ is 1 in every basis
        assert found.mean_square[name].sum() == pytest.approx(E, rel=1e-3)
    together = torch.stack([found.mean_square[name] for name in norms]).sum(0)
    assert (together.diff() <= 1e-3 * together[0]).all()
    assert len(said) == base.config["num_hidden_layers"]
    again = rotation.principal(base, its, texts, tmp_path, say=said.append)
    assert torch.equal(again.basis, found.basis)
    assert len(said) == base.config["num_hidden_layers"]  # it is read, not found again


def test_a_stream_of_few_dimensions_loses_nothing_in_so_many(turnable, texts, tmp_path):
    base = Checkpoint.read(turnable)
    its = family.family_of(base)
    few = low_rank(base, its)
    windows = [window for those in texts.values() for window in those]
    statistics = calibration.calibrate(few, windows)
    moment = moments.collect(few, texts, tmp_path / "moments")
    heads = base.config["num_attention_heads"]
    keep = RANK + -RANK % heads  # transformers wants a multiple of the heads of some
    plan = dataclasses.replace(CompressionPlan.identity(base.config), hidden_size=keep)
    expected = logits(few, texts["one"])

    def lost(**options):
        made = build.apply(dataclasses.replace(plan, **options), few, its, statistics, moments=moment)
        assert made.config["hidden_size"] == keep
        return float((logits(made, texts["one"]) - expected).square().mean() / expected.square().mean())

    assert lost(rotation="pca") < 1e-5
    assert lost() > 1e-2
    assert lost(rotation="pca", repair="ridge") < 1e-4
    assert lost(rotation="pca", repair="stream") < 1e-4


def test_what_is_known_of_the_inputs_is_known_of_the_turned_model_s(turnable, texts, tmp_path):
    base = Checkpoint.read(turnable)
    its = family.family_of(base)
    found = rotation.principal(base, its, texts, tmp_path)
    of_base = moments.collect(base, texts, tmp_path / "base-moments")
    changed = dataclasses.replace(of_base, change=rotation.of_inputs(base, its, found.basis)).of_layers((1, 3))
    turned = rotation.turn(base, its, found.basis)
    collected = moments.collect(turned, texts, tmp_path / "turned-moments").of_layers((1, 3))
    for part in (its.q, its.o, its.gate, its.down):
        for domain, expected in collected.of(1, part).items():
            moment = changed.of(1, part)[domain]
            # clipping tokens by their length knows the gains: a little of the difference is that
            assert (moment.second - expected.second).norm() < 0.05 * expected.second.norm(), part
            assert moment.tokens == expected.tokens


@pytest.mark.parametrize("name", ["exaone4", "gemma3_text"])
def test_a_norm_behind_a_block_lets_nothing_turn(name, tmp_path, write_pico_model):
    base = Checkpoint.read(write_pico_model(tmp_path / "base", name))
    its = family.family_of(base)
    plan = dataclasses.replace(CompressionPlan.identity(base.config), hidden_size=72, rotation="pca")
    reason = build.check(plan, base, its, kernel_alignment=False, max_bytes=None)
    assert reason is not None
    assert reason.startswith(f"rotation: pca: {name} has a norm behind each block")
    with pytest.raises(InfeasiblePlan, match="choose rotation none"):
        rotation.principal(base, its, {}, tmp_path)


def test_the_size_is_foreseen_with_an_lm_head_of_its_own(turnable, texts, tmp_path):
    base = Checkpoint.read(turnable)
    its = family.family_of(base)
    windows = [window for those in texts.values() for window in those]
    plan = dataclasses.replace(
        CompressionPlan.identity(base.config), hidden_size=72, precision="W8A8", quantizer="gptq", rotation="pca"
    )
    assert build.needs_moments(plan)
    made = build.apply(
        plan,
        base,
        its,
        calibration.calibrate(base, windows),
        moments=moments.collect(base, texts, tmp_path / "moments"),
    )
    made.write(tmp_path / "made")
    assert (tmp_path / "made" / "model.safetensors").stat().st_size == build.predicted_bytes(plan, base, its)
