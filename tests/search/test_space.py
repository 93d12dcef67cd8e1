import dataclasses

import optuna
import pytest

from compressors.plan import CompressionPlan, canonical
from search.config.space_section import Space
from search.setup import setting
from search.study import space

BASE = CompressionPlan(30, 32, 8, 2048, 4096, "bfloat16")


def test_dimensions_are_searched_fixed_or_inherited():
    searched = Space(
        num_hidden_layers={"low": 24, "high": 30, "step": 2}, hidden_size=1920, precision=["W8A8", "bfloat16"]
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    plans = [space.suggest(study.ask(), searched, BASE) for _ in range(60)]
    assert {plan.num_hidden_layers for plan in plans} == {24, 26, 28, 30}
    assert {plan.hidden_size for plan in plans} == {1920}
    assert {plan.intermediate_size for plan in plans} == {4096}
    assert {plan.precision for plan in plans} == {"W8A8", "bfloat16"}
    assert isinstance(study.trials[0].distributions["num_hidden_layers"], optuna.distributions.IntDistribution)


def test_integer_ranges_may_change_on_resume_and_categorical_choices_may_not():
    study = optuna.create_study()
    study.optimize(
        lambda t: space.suggest(t, Space(num_hidden_layers={"low": 26, "high": 30}), BASE).num_hidden_layers, 3
    )
    wider = Space(num_hidden_layers={"low": 20, "high": 30})
    study.optimize(lambda t: space.suggest(t, wider, BASE).num_hidden_layers, 3)
    assert len(study.trials) == 6


def test_drop_from_is_reset_when_no_layer_is_dropped():
    top = CompressionPlan(30, 32, 8, 2048, 4096, "bfloat16", drop_from="top")
    assert canonical(top, BASE) == BASE
    cut = CompressionPlan(29, 32, 8, 2048, 4096, "bfloat16", drop_from="top")
    assert canonical(cut, BASE) == cut


def test_repair_is_reset_where_nothing_can_be_repaired():
    cut = CompressionPlan(29, 32, 8, 2048, 4096, "bfloat16")
    ridge, stream = (dataclasses.replace(cut, repair=name) for name in ("ridge", "stream"))
    assert canonical(ridge, BASE) == cut  # no projection of those that stay lost an input
    assert canonical(stream, BASE) == stream
    assert canonical(dataclasses.replace(BASE, repair="stream", precision="W8A8"), BASE).repair == "none"


def test_rotation_is_reset_where_hidden_size_is_not_cut():
    narrow = CompressionPlan(30, 32, 8, 1024, 4096, "bfloat16", rotation="pca")
    assert canonical(narrow, BASE) == narrow
    assert canonical(dataclasses.replace(narrow, hidden_size=2048), BASE) == BASE


def test_importance_kl_becomes_energy_where_all_key_value_heads_stay():
    fewer = dataclasses.replace(BASE, num_attention_heads=24, num_key_value_heads=6, importance="kl")
    assert canonical(fewer, BASE) == fewer
    narrow = dataclasses.replace(BASE, intermediate_size=2048, num_attention_heads=24, importance="kl")
    assert canonical(narrow, BASE).importance == "energy"
    assert canonical(dataclasses.replace(BASE, importance="kl"), BASE) == BASE


def test_smoothing_is_reset_where_inputs_are_not_rounded_to_integers():
    rounded = dataclasses.replace(BASE, precision="W8A8", smoothing="smoothquant")
    assert canonical(rounded, BASE) == rounded
    assert canonical(dataclasses.replace(rounded, precision="W4A16"), BASE).smoothing == "none"


@pytest.mark.parametrize(("drop_from", "refits"), [("bottom", False), ("0,1", False), ("0,2", True), ("top", True)])
def test_stream_repair_is_reset_where_no_layer_before_a_gap_stays(drop_from, refits):
    cut = CompressionPlan(28, 32, 8, 2048, 4096, "bfloat16", drop_from=drop_from)
    stream = dataclasses.replace(cut, repair="stream")
    assert canonical(stream, BASE) == (stream if refits else cut)
    narrow = dataclasses.replace(stream, intermediate_size=2048)  # another projection lost inputs
    assert canonical(narrow, BASE) == narrow


def test_the_uncut_trials_start_with_the_base_model_and_try_each_precision():
    searched = Space(
        num_hidden_layers={"low": 24, "high": 30}, drop_from=["top", "importance"], precision=["W8A8", "bfloat16"]
    )
    study = optuna.create_study()
    for params in space.uncut(searched, BASE):
        study.enqueue_trial(params)
    assert space.suggest(study.ask(), searched, BASE) == BASE
    assert space.suggest(study.ask(), searched, BASE) == dataclasses.replace(BASE, precision="W8A8")
    assert space.uncut(Space(), BASE) == [{}]


@pytest.mark.parametrize(
    "searched",
    [
        Space(num_hidden_layers={"low": 24, "high": 28}),
        Space(hidden_size=1024),
        Space(num_hidden_layers={"low": 20, "high": 38, "step": 6}),
    ],
)
def test_a_space_that_always_cuts_has_no_uncut_trial(searched):
    assert space.uncut(searched, BASE) == []


def test_sizes_above_the_base_models_are_refused():
    assert setting.out_of_range(Space(num_hidden_layers={"low": 24, "high": 30}), BASE) is None
    reason = setting.out_of_range(Space(intermediate_size=8192), BASE)
    assert "8192" in reason
    assert "4096" in reason


def test_a_digest_depends_on_the_base_model_and_the_plan():
    other = CompressionPlan(29, 32, 8, 2048, 4096, "bfloat16")
    assert BASE.digest("a") == CompressionPlan.from_dict(BASE.to_dict()).digest("a")
    assert len({BASE.digest("a"), BASE.digest("b"), other.digest("a")}) == 3


def test_query_heads_are_rounded_down_to_what_the_key_value_heads_can_share():
    assert space.shareable(32, 8, BASE) == 32
    assert space.shareable(32, 7, BASE) == 28  # four each, as in the base
    assert space.shareable(20, 6, BASE) == 18
    assert space.shareable(3, 8, BASE) == 8
    only_groups = Space(num_key_value_heads=6)
    assert space.suggest(optuna.create_study().ask(), only_groups, BASE).num_attention_heads == 24
    fixed = Space(num_key_value_heads=6, num_attention_heads=20)
    assert space.suggest(optuna.create_study().ask(), fixed, BASE).num_attention_heads == 20
