"""Repair through the whole model, and the order in which layers go."""

import dataclasses
import itertools

import pytest
import torch

from compressors import build, calibration, family, leave_one_out, moments
from compressors.checkpoint import Checkpoint, LazyTensor
from compressors.errors import CheckpointError
from compressors.methods import depth, ffn, hidden, stream
from compressors.plan import CompressionPlan

F32 = torch.float32


def windows_of(seed, low, high, count=4, length=24):
    return torch.randint(low, high, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def domains():
    return {"low": windows_of(1, 3, 200, 12), "high": windows_of(2, 100, 320, 12)}


@pytest.fixture(scope="module")
def base(pico):
    return Checkpoint.read(pico)


@pytest.fixture(scope="module")
def its_family(base):
    return family.family_of(base)


def with_tensors(checkpoint, changed):
    def lazily(value):
        return LazyTensor(tuple(value.shape), value.dtype, lambda: value)

    return dataclasses.replace(
        checkpoint, tensors={**checkpoint.tensors, **{name: lazily(value) for name, value in changed.items()}}
    )


def in_float32(checkpoint):
    return dataclasses.replace(
        checkpoint,
        config={**checkpoint.config, "dtype": "float32"},
        tensors={name: tensor.map(torch.Tensor.float, F32) for name, tensor in checkpoint.tensors.items()},
    )


@torch.inference_mode()
def logits(checkpoint, windows):
    return checkpoint.to_model("cpu", F32)(input_ids=torch.tensor(windows), use_cache=False).logits


def kl(checkpoint, other, windows):
    """Nats per token of the predictions of `other` from those of `checkpoint`."""
    p, q = logits(checkpoint, windows).log_softmax(-1), logits(other, windows).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.inference_mode()
def hidden_states(checkpoint, windows):
    """What each layer was given and put out, [B, T, E] each, of the stock model."""
    model = checkpoint.to_model("cpu", F32)
    found = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, args, out: found.append((args[0], out[0] if isinstance(out, tuple) else out))
        )
    model(input_ids=torch.tensor(windows), use_cache=False)
    return found


def refit(cut, base, its_family, domains, *, layers=range(5), lost=(), dimensions=None):
    parts = stream.refit_parts(its_family, layers, 5, lost, dimensions)
    return stream.refit(cut, base, its_family, layers, parts, dimensions, domains)[0]


# -- repair --------------------------------------------------------------------------------------------------


def test_what_loses_nothing_stays_as_it_is(base, its_family, domains):
    made = refit(base, base, its_family, domains, lost=[its_family.o, its_family.down])
    assert len(made) == 2 * 5
    for name, weight in made.items():
        assert torch.equal(weight, base.tensors[name].load()), name


def test_a_channel_that_there_is_twice_is_taken_over_by_its_twin(base, its_family, domains):
    """down then has to add the column of the one that goes to that of the one that stays."""
    base, changed = in_float32(base), {}
    for layer in range(5):
        for part in (its_family.gate, its_family.up):
            for suffix in ("weight", "bias"):
                name = f"{its_family.in_layer(layer, part)}.{suffix}"
                if name in base.tensors:
                    weight = base.tensors[name].load().clone()
                    weight[140:] = weight[:20]
                    changed[name] = weight
    twins = with_tensors(base, changed)
    cut = ffn.cut(twins, its_family, [torch.arange(140)] * 5)
    made = with_tensors(cut, refit(cut, twins, its_family, domains, lost=[its_family.down]))
    unseen = windows_of(9, 3, 320)
    lost, left = kl(twins, cut, unseen), kl(twins, made, unseen)
    assert lost > 0.05
    assert left < 0.03 * lost


@pytest.mark.parametrize("cut_of", ["FFN", "depth", "hidden"])
def test_the_stream_is_nearer_to_the_base_models_on_text_that_was_not_seen(base, its_family, domains, cut_of):
    base = in_float32(base)
    layers, lost, dimensions = list(range(5)), [], None
    if cut_of == "FFN":
        cut, lost = ffn.cut(base, its_family, [torch.arange(128)] * 5), [its_family.down]
    elif cut_of == "depth":
        layers = [0, 1, 3, 4]
        cut = depth.cut(base, its_family, layers)
    else:
        width = int(base.config["hidden_size"])
        dimensions = torch.arange(width - 24)
        cut = hidden.cut(base, its_family, dimensions, None)
    made = with_tensors(cut, refit(cut, base, its_family, domains, layers=layers, lost=lost, dimensions=dimensions))
    unseen = windows_of(9, 3, 320, 8)
    whole = hidden_states(base, unseen)[-1][1]
    if dimensions is not None:
        whole = whole[..., dimensions]
    before, after = ((hidden_states(one, unseen)[-1][1] - whole).square().mean() for one in (cut, made))
    assert after < 0.98 * before


def test_it_is_the_least_squares_of_what_the_cut_model_reads(pico_llama, domains):
    """Layer 1's down_proj, against a solution from the stock models' hidden states."""
    base = in_float32(Checkpoint.read(pico_llama))
    its_family = family.family_of(base)
    kept = [torch.arange(128)] * 5
    cut = ffn.cut(base, its_family, kept)
    made = refit(cut, base, its_family, domains, lost=[its_family.down])
    name = f"{its_family.in_layer(1, its_family.down)}.weight"
    below = {key: value for key, value in made.items() if not key.startswith(tuple(f"model.layers.{n}" for n in "234"))}
    del below[name]
    repaired = with_tensors(cut, below)  # up to down of layer 1
    fits = {}
    for domain, windows in domains.items():
        model = repaired.to_model("cpu", F32)
        seen = []
        model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0])
        )
        with torch.inference_mode():
            model(input_ids=torch.tensor(windows), use_cache=False)
        target = hidden_states(base, windows)[1][1]
        missing = target - hidden_states(repaired, windows)[1][1]
        weight = 1 / target.square().mean(-1, keepdim=True)
        x, missing = ((those * weight.sqrt()).flatten(0, 1).double() for those in (seen[0], missing))
        fits[domain] = (x.T @ x / len(x), missing.T @ x / len(x))
    second = sum(one for one, _ in fits.values()) / 2
    cross = sum(one for _, one in fits.values()) / 2
    change = made[name].double() - cut.tensors[name].load().double()
    eye = torch.eye(128, dtype=torch.float64) * second.diagonal().median()
    off = {
        factor: float((change - cross @ torch.linalg.inv(second + factor * eye)).norm() / change.norm())
        for factor in stream.STRENGTHS
    }
    assert min(off.values()) < 1e-3, off


def test_what_one_domain_says_and_another_denies_changes_nothing():
    x = torch.randn(1, 400, 6, generator=torch.Generator().manual_seed(0))
    change = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    yes, no = stream.Fit(), stream.Fit()
    yes.add(x, x @ change.T, torch.ones(1, 400, 1))
    no.add(x, -x @ change.T, torch.ones(1, 400, 1))
    delta, strength = stream.change([yes, no])
    assert strength == stream.Strength(float("inf"), 1.0)
    assert not delta.any()
    delta, strength = stream.change([yes, yes])
    assert strength.factor == min(stream.STRENGTHS)
    assert strength.left < 0.01
    torch.testing.assert_close(delta.float(), change, rtol=0.01, atol=0.01)


def test_a_plan_is_repaired_when_its_weights_are_read_and_once(base, its_family, domains, tmp_path):
    moment = moments.collect(base, domains, tmp_path / "m")
    statistics = calibration.calibrate(base, domains["low"])
    own = CompressionPlan.identity(base.config)
    plan = dataclasses.replace(own, intermediate_size=128, num_hidden_layers=4, repair="stream", drop_from="kl")
    said = []
    made = build.apply(plan, base, its_family, statistics, moments=moment, say=said.append)
    assert not list(moment.path.glob("stream-*"))  # for shapes alone nothing is computed
    plain = build.apply(dataclasses.replace(plan, repair="none"), base, its_family, statistics, moments=moment)
    assert {name: one.shape for name, one in made.tensors.items()} == {n: one.shape for n, one in plain.tensors.items()}
    made.write(tmp_path / "made")
    assert said[-1] == "repair, layer 4 of 4"
    said.clear()
    again = build.apply(plan, base, its_family, statistics, moments=moment, simulate=True, say=said.append)
    assert again.digest() == Checkpoint.read(tmp_path / "made").digest()
    assert said == []
    other = build.apply(
        dataclasses.replace(plan, intermediate_size=96), base, its_family, statistics, moments=moment, say=said.append
    )
    other.digest()
    assert len(list(moment.path.glob("stream-*"))) == 2
    unseen = windows_of(9, 3, 320)
    assert kl(base, made, unseen) < kl(base, plain, unseen)


# -- which layers go -----------------------------------------------------------------------------------------


def dead(base, its_family, layers):
    """The model with layers that add nothing to the stream."""
    changed = {}
    for layer in layers:
        for part in (its_family.o, its_family.down):
            for suffix in ("weight", "bias"):
                name = f"{its_family.in_layer(layer, part)}.{suffix}"
                if name in base.tensors:
                    changed[name] = torch.zeros_like(base.tensors[name].load())
    return with_tensors(base, changed)


def test_layers_go_by_what_the_predictions_lose(base, its_family, domains, tmp_path):
    model = dead(in_float32(base), its_family, [1, 3])
    windows = domains["low"][:3]
    found = leave_one_out.order(model, its_family, windows, 3, tmp_path / "order.json", batch=2)
    assert set(found.removed[:2]) == {1, 3}
    assert max(found.kl[:2]) < 1e-4
    each = {layer: kl(model, depth.cut(model, its_family, sorted({0, 2, 4} - {layer})), windows) for layer in (0, 2, 4)}
    assert found.removed[2] == min(each, key=lambda layer: each[layer])
    assert found.kl[2] == pytest.approx(each[found.removed[2]], rel=0.02)


def test_an_order_is_found_once_and_goes_on(pico_llama, domains, tmp_path):
    base = Checkpoint.read(pico_llama)
    its_family, windows = family.family_of(base), domains["low"][:2]
    path = tmp_path / "sub" / "order.json"
    two = leave_one_out.order(base, its_family, windows, 2, path)
    three = leave_one_out.order(base, its_family, windows, 3, path)
    assert three.removed[:2] == two.removed
    stamp = path.stat().st_mtime_ns
    assert leave_one_out.order(base, its_family, windows, 1, path).removed == two.removed[:1]
    assert path.stat().st_mtime_ns == stamp
    path.write_text("{")
    with pytest.raises(CheckpointError, match="delete it"):
        leave_one_out.order(base, its_family, windows, 1, path)


def test_look_ahead_finds_a_pair_that_greed_tears_apart(pico_llama, domains, tmp_path):
    """By every first layer with its best second one, the pair that look-ahead takes is the best of its AHEAD."""
    base = in_float32(Checkpoint.read(pico_llama))
    its_family, windows = family.family_of(base), domains["low"][:2]
    found = leave_one_out.order(base, its_family, windows, 2, tmp_path / "order.json", look_ahead=True)
    pairs = {
        pair: kl(base, depth.cut(base, its_family, sorted(set(range(5)) - set(pair))), windows)
        for pair in itertools.combinations(range(5), 2)
    }
    assert found.kl[1] == pytest.approx(min(pairs.values()), rel=0.05)
