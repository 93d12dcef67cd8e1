"""Test the choice of key/value groups by what the predictions lose without them."""

import dataclasses
import functools
import json

import pytest
import torch

from compressors import build
from compressors.methods import heads_by_kl, importance
from compressors.model import family
from compressors.model.checkpoint import Checkpoint, LazyTensor
from compressors.plan import CompressionPlan
from compressors.statistics import activations, second_moments

GROUPS = 8


@pytest.fixture(scope="module")
def domains():
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randint(3, 320, (6, 24), generator=draw).tolist() for name in ("one", "other")}


@pytest.fixture(scope="module", params=["llama", "exaone4"])
def model(request, tmp_path_factory, write_pico_model):
    path = tmp_path_factory.mktemp("heads") / "model"
    shapes = {"num_hidden_layers": 3, "num_attention_heads": 2 * GROUPS, "num_key_value_heads": GROUPS}
    return Checkpoint.read(write_pico_model(path, request.param, dtype="float32", **shapes))


@pytest.fixture(scope="module")
def collected(model, domains, tmp_path_factory):
    return second_moments.collect(model, domains, tmp_path_factory.mktemp("moments") / "moments")


def kl_without(model, gone, windows):
    """Return the KL of a stock model whose o_proj is zero for these groups by layer, over every fourth token."""
    its, size = family.family_of(model), family.head_dim(model.config)
    width, tensors = 2 * size, dict(model.tensors)
    for layer, groups in enumerate(gone):
        name = f"{its.in_layer(layer, its.o)}.weight"
        weight = model.tensors[name].load().clone()
        for group in groups:
            weight[:, group * width : (group + 1) * width] = 0
        tensors[name] = LazyTensor(weight.shape, weight.dtype, lambda weight=weight: weight)
    with torch.inference_mode():
        p, q = (
            one.to_model("cpu", torch.float32)(torch.tensor(windows), use_cache=False).logits[:, 3::4].log_softmax(-1)
            for one in (model, dataclasses.replace(model, tensors=tensors))
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


def least_of(energy, keep):
    return [tuple(sorted(sorted(range(GROUPS), key=lambda group: those[group])[: GROUPS - keep])) for those in energy]


def by_hand(model, energy, keep, windows):
    gone, costs = least_of(energy, keep), []

    @functools.cache
    def cost(*those):
        return kl_without(model, those, windows)

    for _ in range(heads_by_kl.SWEEPS):
        for layer in range(3):
            tried = sorted(range(GROUPS), key=lambda group: energy[layer][group])[: GROUPS - keep + 3]

            def without(groups, layer=layer):
                return cost(*gone[:layer], groups, *gone[layer + 1 :])

            going = ()
            for _ in range(GROUPS - keep):
                going = min(
                    (tuple(sorted((*going, group))) for group in tried if group not in going),
                    key=without,
                )
            gone[layer] = min((gone[layer], going), key=without)
            costs.append(without(gone[layer]))
    return gone, costs


@pytest.mark.long
@pytest.mark.parametrize("keep", [6, 3])
def test_each_layer_loses_the_groups_that_cost_least_given_the_other_layers(model, domains, collected, tmp_path, keep):
    its = family.family_of(model)
    energy = importance.group_energies(model, its, collected)
    windows = [window for those in domains.values() for window in those]
    found = heads_by_kl.choose(model, its, domains, energy, keep, tmp_path)
    expected, costs = by_hand(model, energy, keep, windows)
    assert found == expected
    assert found != least_of(energy, keep)
    assert costs == sorted(costs, reverse=True), "no step makes it worse"
    assert costs[-1] < kl_without(model, least_of(energy, keep), windows)


def test_the_windows_are_spread_over_the_text(model, domains, collected, tmp_path, monkeypatch):
    monkeypatch.setattr(heads_by_kl, "WINDOWS", 2)
    its = family.family_of(model)
    energy = importance.group_energies(model, its, collected)
    few = {name: [windows[0], windows[3]] for name, windows in domains.items()}
    (tmp_path / "few").mkdir()
    assert heads_by_kl.choose(model, its, domains, energy, 6, tmp_path) == heads_by_kl.choose(
        model, its, few, energy, 6, tmp_path / "few"
    )


def test_a_choice_that_other_energies_led_to_is_not_taken(model, domains, tmp_path, monkeypatch):
    """As those of the same texts by other weights, whose moments lie in the same directory."""
    monkeypatch.setattr(heads_by_kl, "SWEEPS", 1)
    its = family.family_of(model)
    few = {name: windows[:2] for name, windows in domains.items()}
    one = [[float(group) for group in range(GROUPS)]] * 3
    other = [[float(-group) for group in range(GROUPS)]] * 3
    said = []

    def chosen(energy, directory):
        said.clear()
        directory.mkdir(exist_ok=True)
        return heads_by_kl.choose(model, its, few, energy, 7, directory, say=said.append)

    first = chosen(one, tmp_path / "shared")
    assert set().union(*first) <= {0, 1, 2, 3}
    assert chosen([[2 * of_group for of_group in of_layer] for of_layer in one], tmp_path / "shared") == first
    assert said == [], "energies of the same order lead to the same choice"
    second = chosen(other, tmp_path / "shared")
    assert said
    assert set().union(*second) <= {4, 5, 6, 7}
    assert second == chosen(other, tmp_path / "alone")
    file = tmp_path / "shared" / "groups-7.json"
    stored = json.loads(file.read_text())
    del stored["sha256"]  # as earlier versions wrote it, which said nothing of the energies
    file.write_text(json.dumps({**stored, "rules": heads_by_kl.VERSION}))
    assert chosen(one, tmp_path / "shared") == first


@pytest.mark.long
def test_a_killed_search_resumes_where_it_was_and_a_damaged_one_begins_again(
    model, domains, collected, tmp_path, damages
):
    its = family.family_of(model)
    energy = importance.group_energies(model, its, collected)
    expected = heads_by_kl.choose(model, its, domains, energy, 6, tmp_path)

    def interrupt(what):
        if "sweep 2 of 2: layer 2 of 3" in what:
            raise KeyboardInterrupt

    (tmp_path / "cut").mkdir()
    with pytest.raises(KeyboardInterrupt):
        heads_by_kl.choose(model, its, domains, energy, 6, tmp_path / "cut", say=interrupt)
    said = []
    assert heads_by_kl.choose(model, its, domains, energy, 6, tmp_path / "cut", say=said.append) == expected
    assert [what for what in said if "sweep" in what] == [
        f"leaving out heads, sweep 2 of 2: layer {layer} of 3" for layer in (2, 3)
    ]
    said.clear()
    assert heads_by_kl.choose(model, its, domains, energy, 6, tmp_path / "cut", say=said.append) == expected
    assert said == []
    file = tmp_path / "cut" / "groups-6.json"
    stored = json.loads(file.read_text())
    del stored["sha256"]
    file.write_text(json.dumps({**stored, "rules": [0], "gone": [[0, 1]] * 3}))  # of another version: searched again
    assert heads_by_kl.choose(model, its, domains, energy, 6, tmp_path / "cut") == expected
    whole = json.loads(file.read_text())
    del whole["sha256"]  # as earlier versions wrote it
    for wrong in ({}, {**whole, "done": "all"}, {**whole, "gone": [[0]]}, {**whole, "gone": [[0, 0]] * 3}):
        file.write_text(json.dumps(wrong))
        assert heads_by_kl.choose(model, its, domains, energy, 6, tmp_path / "cut") == expected
        assert damages.told() == [file]


def test_a_plan_keeps_the_other_groups_in_its_kept_layers(model, domains, collected):
    """Groups are chosen in the whole model, so a plan with fewer layers needs no other choice."""
    its, own = family.family_of(model), CompressionPlan.identity(model.config)
    energy = importance.group_energies(model, its, collected)
    gone = heads_by_kl.choose(model, its, domains, energy, 6, collected.path)
    plan = dataclasses.replace(
        own, num_hidden_layers=2, drop_from="0", num_key_value_heads=6, num_attention_heads=12, importance="kl"
    )
    said = []
    statistics = activations.calibrate(model, domains["one"])
    made = build.apply(plan, model, its, statistics, moments=collected, say=said.append)
    assert said == []
    size = family.head_dim(model.config)
    for new, old in enumerate((1, 2)):
        stay = [group for group in range(GROUPS) if group not in gone[old]]
        rows = torch.cat([torch.arange(group * size, (group + 1) * size) for group in stay])
        whole = model.tensors[f"{its.in_layer(old, its.k)}.weight"].load()
        assert torch.equal(made.tensors[f"{its.in_layer(new, its.k)}.weight"].load(), whole[rows])
    assert build.versions(plan) == [f"heads {heads_by_kl.VERSION}"]
    # fewer query heads of the same groups, and channels: by energy
    narrow = dataclasses.replace(own, num_attention_heads=8, intermediate_size=64)
    one, other = (
        build.apply(dataclasses.replace(narrow, importance=how), model, its, statistics, moments=collected)
        for how in ("kl", "energy")
    )
    assert all(torch.equal(one.tensors[name].load(), other.tensors[name].load()) for name in one.tensors)
