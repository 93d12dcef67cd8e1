"""Test second moments, the choices made by them, and the repair with them."""

import dataclasses
import itertools
import math
import weakref

import pytest
import torch

from compressors import build
from compressors.errors import CheckpointError
from compressors.methods import ffn, heads, importance, repair
from compressors.methods.importance import energy, flap, obs
from compressors.model.checkpoint import Checkpoint
from compressors.plan import CompressionPlan
from compressors.statistics import activations, second_moments
from compressors.statistics.second_moments import Moment
from compressors.steps import quantize


def moment_of(x):
    """Return the moments of x [n, K]."""
    return Moment(x.T @ x / len(x), x.mean(0), len(x))


@pytest.fixture(scope="module")
def domains():
    generator = torch.Generator().manual_seed(3)
    return {
        "low": torch.randint(3, 160, (5, 24), generator=generator).tolist(),
        "high": torch.randint(160, 320, (4, 24), generator=generator).tolist(),
    }


@pytest.fixture(scope="module")
def collected(base, domains, tmp_path_factory):
    return second_moments.collect(base, domains, tmp_path_factory.mktemp("moments") / "m", batch=2)


# -- second moments ------------------------------------------------------------------------------------------


def test_second_moments_equal_those_of_a_whole_forward_pass(base, its_family, domains, collected):
    model = base.to_model("cpu", torch.float32)
    names = dict(model.named_modules())
    for domain, windows in domains.items():
        for layer, part in itertools.product(range(collected.layers[-1] + 1), its_family.linears):
            seen, put_out = [], []
            module = names[its_family.in_layer(layer, part)]

            def told(module, args, out, seen=seen, put_out=put_out):
                seen.append(args[0][0])
                put_out.append(out[0])

            hook = module.register_forward_hook(told)
            with torch.inference_mode():
                for window in windows:
                    model(input_ids=torch.tensor([window]), use_cache=False)
            hook.remove()
            if part in its_family.output_norms:  # a token counts as much as the norm magnifies what it puts out
                x = torch.cat(seen)
                weights = 1 / (torch.cat(put_out).square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
                assert float(weights.max() / weights.min()) > 2
            else:
                x = second_moments.clipped(torch.stack(seen)).flatten(0, 1)
                weights = torch.ones(len(x), 1)
            found = collected.of(layer, second_moments.input_of(its_family, part))[domain]
            assert found.tokens == len(x) == len(windows) * 24
            torch.testing.assert_close(found.second, (weights * x).T @ x / len(x), rtol=1e-3, atol=1e-5)
            mean, share = (weights * x).sum(0) / weights.sum(), weights.mean()
            torch.testing.assert_close(found.mean, mean * share.sqrt(), rtol=1e-3, atol=1e-5)
            if part in its_family.output_norms:  # what is lost counts relative to what is put out, in each domain
                weight = names[its_family.in_layer(layer, part)].weight
                whole = float(((weight @ found.second) * weight).sum()) / len(weight)
                assert whole == pytest.approx(1.0, abs=0.01), (domain, layer, part)
            variance = found.second.diagonal() - found.mean.square()
            torch.testing.assert_close(
                variance, share * ((weights * (x - mean).square()).sum(0) / weights.sum()), rtol=1e-2, atol=1e-4
            )


def test_a_massive_token_does_not_hold_the_trace():
    x = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    calm = x.clone()
    x[0, 0] *= 1e4
    found = second_moments.clipped(x)
    assert torch.equal(found[1], calm[1])
    assert torch.equal(found[0, 1:], calm[0, 1:])
    assert float(found[0, 0].norm()) == pytest.approx(
        second_moments.CLIP * float(calm[0].norm(dim=-1).median()), rel=0.05
    )
    torch.testing.assert_close(found[0, 0] / found[0, 0].norm(), calm[0, 0] / calm[0, 0].norm())


def test_second_moments_are_collected_once_and_renumbered_with_the_layers(base, domains, collected):
    stamp = (collected.path / "layer-0.safetensors").stat().st_mtime_ns
    assert second_moments.collect(base, domains, collected.path) == collected
    assert (collected.path / "layer-0.safetensors").stat().st_mtime_ns == stamp
    kept = collected.of_layers([0, 2, 4])
    part = "mlp.down_proj"
    assert torch.equal(kept.of(1, part)["low"].second, collected.of(2, part)["low"].second)


def test_damaged_layers_are_collected_again_and_no_others(pico_llama, domains, tmp_path, damages):
    base = Checkpoint.read(pico_llama)
    few = {"low": domains["low"][:1], "high": domains["high"][:1]}
    path, part = tmp_path / "m", "self_attn.q_proj"  # the last in a file
    found = second_moments.collect(base, few, path)
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    damages.flip(path / "layer-1.safetensors")  # in the tensors: seen when they are read
    assert torch.equal(found.of(1, part)["low"].second, found.of(1, part)["low"].second)
    assert [path.name for path in damages.told()] == ["layer-1.safetensors"]
    (path / "stream-0.safetensors").write_bytes(b"of no concern")
    times = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    (path / "layer-3.safetensors").write_bytes(bytes(1000))
    (path / "windows.json").write_text("{}")
    assert second_moments.collect(base, few, path) == found
    assert [path.name for path in damages.told()] == ["windows.json", "layer-3.safetensors"]
    assert {file.name for file in path.iterdir()} >= set(whole)
    again = {file.name for file in path.iterdir() if file.stat().st_mtime_ns != times[file.name]}
    assert again == {"windows.json", "layer-3.safetensors"}
    opened = second_moments.opened(path)
    damages.flip(path / "layer-0.safetensors")
    with pytest.raises(CheckpointError, match="delete it"):  # without the model
        opened.of(0, part)


def test_windows_of_several_lengths_are_refused(base, tmp_path):
    with pytest.raises(CheckpointError, match="same length"):
        second_moments.collect(base, {"odd": [[3, 4, 5], [3, 4]]}, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == []


# -- repair --------------------------------------------------------------------------------------------------


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(12, 12, generator=generator) * 0.6 + torch.eye(12)
    x = torch.randn(400, 12, generator=generator) @ mix
    weight = torch.randn(7, 12, generator=generator)
    kept = torch.tensor([0, 2, 3, 5, 7, 8, 11])
    return x, weight, kept


def test_without_a_ridge_the_repair_is_least_squares(problem):
    x, weight, kept = problem
    made = repair.ridge(weight, kept, moment_of(x).second, 1e-9)
    expected = torch.linalg.lstsq(x[:, kept].double(), (x @ weight.T).double()).solution.T
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


def test_the_ridge_pulls_toward_the_kept_weights(problem):
    x, weight, kept = problem
    second = moment_of(x).second
    own = weight.double()[:, kept]
    assert torch.equal(repair.ridge(weight, kept, second, repair.NO_REPAIR), own)
    torch.testing.assert_close(repair.ridge(weight, kept, second, 1e9), own, rtol=1e-6, atol=1e-6)
    distances = [float((repair.ridge(weight, kept, second, f) - own).norm()) for f in repair.STRENGTHS]
    assert distances == sorted(distances, reverse=True)
    # any other W' loses more, by the loss in the module's docstring
    factor = 0.3
    made = repair.ridge(weight, kept, second, factor)
    unit = float(second.diagonal()[kept].double().median())

    def objective(candidate):
        ridge = factor * unit * float((candidate - own).square().sum())
        return repair.loss(weight, candidate, kept, second) + ridge

    generator = torch.Generator().manual_seed(6)
    for _ in range(5):
        step = 1e-3 * torch.randn(made.shape, generator=generator, dtype=torch.float64)
        assert objective(made) < objective(made + step)


def test_the_loss_is_the_mean_over_tokens(problem):
    x, weight, kept = problem
    made = weight[:, kept] * 0.9
    direct = (x @ weight.T - x[:, kept] @ made.T).square().sum(1).mean()
    assert repair.loss(weight, made, kept, moment_of(x).second) == pytest.approx(float(direct), rel=1e-4)


def test_removing_inputs_that_others_determine_costs_nothing(problem):
    x, weight, kept = problem
    gone = repair.removed(kept, 12)
    x = x.clone()
    x[:, gone] = x[:, kept[: len(gone)]] * 2 - x[:, kept[1 : len(gone) + 1]]
    repaired = repair.ridge(weight, kept, moment_of(x).second, 1e-8)
    unrepaired = repair.loss(weight, weight[:, kept], kept, moment_of(x).second)
    assert unrepaired > 1000
    # what is left is the rounding of sums in float32, which differs between processors
    assert repair.loss(weight, repaired, kept, moment_of(x).second) < 1e-6 * unrepaired


def test_the_strength_is_best_on_a_domain_left_out_of_the_fit(problem):
    x, weight, kept = problem
    alike = {"a": moment_of(x[:200]), "b": moment_of(x[200:])}
    assert repair.strength(weight, kept, alike) <= 0.1
    # what is right for one domain is wrong for the other, so nothing is gained
    gone = repair.removed(kept, 12)
    other = x.clone()
    other[:, gone] *= -1.0
    assert repair.strength(weight, kept, {"a": moment_of(x), "b": moment_of(other)}) == repair.NO_REPAIR


def test_no_domain_that_is_left_out_is_worse_off_than_without_a_repair(problem):
    """What many domains say of the removed inputs is wrong for another by more than half."""
    x, weight, kept = problem
    gone = repair.removed(kept, 12)
    other = x.clone()
    other[:, gone] = 0.4 * other[:, gone]
    alike = {name: moment_of(x) for name in "abcdef"}
    domains = {**alike, "other": moment_of(other)}
    factor = repair.strength(weight, kept, domains)
    assert repair.strength(weight, kept, alike) < factor < repair.NO_REPAIR
    for name, moment in domains.items():
        made = repair.ridge(weight, kept, second_moments.mixed(domains, without=name).second, factor)
        assert repair.loss(weight, made, kept, moment.second) <= repair.loss(
            weight, weight[:, kept], kept, moment.second
        )


def test_a_strength_from_near_by_is_taken_where_it_gains(problem):
    x, weight, kept = problem
    alike = {"a": moment_of(x[:200]), "b": moment_of(x[200:])}
    best = repair.strength(weight, kept, alike)
    assert best != 3.0
    assert repair.strength(weight, kept, alike, 3.0) == 3.0
    assert repair.strength(weight, kept, alike, repair.NO_REPAIR) == best
    gone = repair.removed(kept, 12)
    other = x.clone()
    other[:, gone] = 0.4 * other[:, gone]
    domains = {**{name: moment_of(x) for name in "abcdef"}, "other": moment_of(other)}
    assert repair.strength(weight, kept, domains, best) == repair.strength(weight, kept, domains) > best


def test_a_strength_depends_on_no_plan_that_came_before(base, its_family, domains, tmp_path):
    """A layer takes over what the explored one has, which in another plan keeps other inputs."""
    part = its_family.down
    same = [torch.arange(0, 160, 2)] * 4
    plans = [[first, *same] for first in (torch.arange(80), torch.arange(0, 160, 2))]

    def repaired(kept, place):
        moments = second_moments.collect(base, domains, tmp_path / place)
        made = repair.take_over(ffn.cut(base, its_family, kept), base, its_family, [part], kept, moments)
        return [made.tensors[f"{its_family.in_layer(layer, part)}.weight"].load() for layer in range(5)]

    alone = repaired(plans[1], "alone")
    repaired(plans[0], "shared")
    after = repaired(plans[1], "shared")
    assert all(torch.equal(one, other) for one, other in zip(alone, after, strict=True))
    assert len(list((tmp_path / "shared" / "strengths").iterdir())) == 9  # layer 4 is explored by itself in both


def test_a_text_that_weighs_more_loses_less(base, its_family, domains, tmp_path):
    part = its_family.down
    whole = base.tensors[f"{its_family.in_layer(2, part)}.weight"].load()
    kept = [torch.arange(0, 160, 2)] * 5
    lost = {}
    for weights in (None, {"low": 1.0, "high": 20.0}, {"low": 3.0, "high": 60.0}):
        moments = second_moments.collect(base, domains, tmp_path / "m", weights=weights)
        moments = dataclasses.replace(moments, strength=1e-3)
        cut = ffn.cut(base, its_family, kept)
        made = repair.take_over(cut, base, its_family, [part], kept, moments)
        weight = made.tensors[f"{its_family.in_layer(2, part)}.weight"].load()
        judged = moments.of(2, part)
        lost[str(weights)] = [repair.loss(whole, weight, kept[2], judged[name].second) for name in ("low", "high")]
        mean = second_moments.mixed(judged).second
        parts = [judged[name].second * share for name, share in moments.shares().items()]
        torch.testing.assert_close(mean, sum(parts) / 2)
    same, more, scaled = lost.values()
    assert more[1] < same[1]
    assert more[0] > same[0]
    assert scaled == more


def reader(weight, x):
    return importance.Reader(lambda: weight, lambda: moment_of(x))


# -- importance ----------------------------------------------------------------------------------------------


def test_flap_is_the_variance_times_the_norm_of_the_column():
    x = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 1.0], [5.0, 5.0, 2.0]])
    weight = torch.tensor([[1.0, 9.0, 2.0], [0.0, 9.0, 2.0]])
    expected = x.var(0, correction=0).double() * weight.double().square().sum(0)
    torch.testing.assert_close(flap.fluctuation(weight, moment_of(x)), expected, rtol=1e-4, atol=1e-5)
    assert flap.channels(reader(weight, x), 2).tolist() == [0, 2]  # the constant one goes


def test_energy_is_the_mean_square_that_a_block_adds_to_the_output(problem):
    x, weight, _ = problem
    for size in (1, 3):
        expected = torch.stack([
            (x[:, start : start + size].double() @ weight[:, start : start + size].double().T).square().sum(1).mean()
            for start in range(0, 12, size)
        ])  # fmt: skip
        torch.testing.assert_close(energy.energy(weight, moment_of(x), size), expected, rtol=1e-4, atol=1e-6)
    largest = energy.energy(weight, moment_of(x)).topk(5).indices.sort().values
    assert energy.channels(reader(weight, x), 5).tolist() == largest.tolist()


def test_groups_are_removed_by_what_their_heads_add_together():
    """Two heads whose outputs cancel add nothing, however large they are."""
    together, alone = [9.0, 9.0, 1.0, 1.0], [0.1, 2.0]
    assert heads.choose(4, 2, 2, 1, together, alone) == ((1, (2, 3)),)
    assert heads.choose(4, 2, 2, 1, together) == ((0, (0, 1)),)


def test_obs_removes_inputs_that_others_can_replace(problem):
    x, weight, _ = problem
    x = x.clone()
    x[:, 4] = 3.0 * x[:, 9]  # large, and redundant: it or its source goes first
    kept = obs.channels(reader(weight, x), 11).tolist()
    assert set(range(12)) - set(kept) <= {4, 9}


def test_obs_is_the_best_single_choice(problem):
    x, weight, _ = problem
    second = moment_of(x).second
    damped = second.double() + obs.DAMPING * float(second.diagonal().median()) * torch.eye(12).double()

    def lost(gone):
        kept = torch.tensor([i for i in range(12) if i != gone])
        return repair.loss(weight, repair.ridge(weight, kept, damped, 1e-12), kept, damped)

    best = min(range(12), key=lost)
    assert obs.channels(reader(weight, x), 11).tolist() == [i for i in range(12) if i != best]


@pytest.mark.parametrize("how", ["energy", "flap", "obs"])
def test_every_group_keeps_the_same_number_of_heads(base, its_family, collected, how):
    config = base.config
    count, groups = config["num_attention_heads"], config["num_key_value_heads"]
    keep_groups = groups - 1
    keep = keep_groups * max(count // groups - 1, 1)
    for kept in importance.choose_heads(base, its_family, keep, keep_groups, how, moments=collected):
        assert heads.infeasible(count, groups, keep, keep_groups) is None
        assert [group for group, _ in kept] == sorted({group for group, _ in kept})
        assert len(kept) == keep_groups
        for group, members in kept:
            assert len(members) == keep // keep_groups
            assert list(members) == sorted(members)
            assert all(member // (count // groups) == group for member in members)


@dataclasses.dataclass(frozen=True)
class Watched(second_moments.Moments):
    """Watched notes how many of the moments that it gave out are alive when the next one is asked for."""

    given: list = dataclasses.field(default_factory=list, compare=False)
    alive: list = dataclasses.field(default_factory=list, compare=False)

    def mixed(self, layer, part, device="cpu"):
        self.alive.append(sum(one() is not None for one in self.given))
        moment = super().mixed(layer, part, device)
        self.given.append(weakref.ref(moment.second))
        return moment


@pytest.mark.parametrize("how", ["energy", "flap", "obs"])
def test_one_layers_moments_are_in_memory_at_a_time(base, its_family, collected, how):
    config = base.config
    groups, each = config["num_key_value_heads"], config["num_attention_heads"] // config["num_key_value_heads"]
    choices = {
        "channels": lambda moments: importance.choose_channels(base, its_family, 158, how, moments=moments),
        "heads": lambda moments: importance.choose_heads(
            base, its_family, (groups - 1) * each, groups - 1, how, moments=moments
        ),
        "energies": lambda moments: importance.group_energies(base, its_family, moments),
    }
    for name, choose in choices.items():
        watched = Watched(**{field.name: getattr(collected, field.name) for field in dataclasses.fields(collected)})
        choose(watched)
        assert watched.alive == [0] * config["num_hidden_layers"], name


# -- in a plan -----------------------------------------------------------------------------------------------


CUTS = {
    "ffn": {"intermediate_size": 96},
    "heads": {"num_key_value_heads": 2, "num_attention_heads": 4},
    "hidden": {"hidden_size": 72},
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_repaired_plan_loses_less_and_loads(base, its_family, domains, collected, cut, tmp_path):
    from transformers import AutoModelForCausalLM

    own = CompressionPlan.identity(base.config)
    if base.config["num_key_value_heads"] < 3 and cut == "heads":
        pytest.skip("no group to spare")
    windows = [window for those in domains.values() for window in those]
    statistics = activations.calibrate(base, windows)
    plan = dataclasses.replace(own, **CUTS[cut])
    reason = build.check(plan, base, its_family, max_bytes=None)
    if reason:
        pytest.skip(reason)
    original = base.to_model("cpu", torch.float32)
    lost = {}
    for how in ("none", "ridge"):
        made = build.apply(
            dataclasses.replace(plan, repair=how, precision="float32"), base, its_family, statistics, moments=collected
        )
        made.write(tmp_path / how)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / how, dtype=torch.float32)
        lost[how] = divergence(original, model, windows)
    if cut == "ffn":  # channels of random weights hardly know of each other
        assert lost["ridge"] <= lost["none"]
    else:
        assert lost["ridge"] < lost["none"]


def divergence(original, model, windows):
    total = 0.0
    with torch.inference_mode():
        for window in windows:
            p, q = (m(torch.tensor([window])).logits[0].log_softmax(-1) for m in (original, model))
            total += float((p.exp() * (p - q)).sum(-1).mean())
    assert math.isfinite(total)
    return total / len(windows)


def test_gptq_sees_the_inputs_of_the_cut_model(base, its_family, collected):
    """The second moment for a quantized projection of a cut model has the width of its cut input."""
    own = CompressionPlan.identity(base.config)
    plan = dataclasses.replace(own, intermediate_size=96, num_hidden_layers=3, drop_from="top")
    made = build.apply(plan, base, its_family, None, moments=collected)
    kept = [torch.arange(96)] * 3
    second = quantize.second_moments(its_family, collected.of_layers([0, 1, 2]), {its_family.down: kept}, "cpu")
    for layer in range(3):
        name = its_family.in_layer(layer, its_family.down)
        assert second(name).shape == (96, 96)
        assert made.tensors[f"{name}.weight"].shape[1] == 96
    assert torch.equal(
        second(its_family.in_layer(1, its_family.up)),
        second_moments.mixed(collected.of(1, its_family.gate)).second,
    )
