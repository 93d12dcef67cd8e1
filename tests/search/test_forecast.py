"""The forecast of a study: its tables, the plans that it prefers, and a sampler that learns where it is wrong."""

import dataclasses
import io
import itertools
import json
import math
import random
import types
from pathlib import Path

import optuna
import pytest
import rich.console

from compressors import build, cached
from compressors.methods import stream
from compressors.plan import CompressionPlan
from evaluator.score import Score
from evaluator.speed_table import Probe, SpeedTable
from search.config import compose
from search.config.space_section import Range
from search.say import silent
from search.setup import keys
from search.setup import setting as settings
from search.show import forecast_view
from search.stages import damage_plans, damage_table, speed_table, step_times
from search.stages.bench import Bench
from search.stages.damage_curves import Loss
from search.stages.damage_table import DamageTable, Entry
from search.stages.engines import Engines
from search.stages.forecast import Forecast
from search.stages.screen import Screener
from search.stages.side_by_side import SideBySide
from search.stages.step_times import StepTimes
from search.study import forecast_sampler, one_trial, outlook, rungs, space, storage, workers
from search.study.forecast_sampler import NOTHING_LEFT, WAIT_IN_A_ROW, WAITS, ForecastSampler
from search.study.objective import Objective
from tests.measurements import measurement

STUDY = """
defaults: [_base, _self_]
study_name: forecast
trials: 4
storage: sqlite:///{home}/studies.db
outputs: {home}/outputs
model: {{source: {model}}}
space:
  num_hidden_layers: {{low: 2, high: 5}}
  intermediate_size: {{low: 80, high: 160, step: 8}}
  num_key_value_heads: {{low: 1, high: 3}}
  precision: [bfloat16, W8A8]
text: {{calibration: embedded, window: 32, shards: 4, calibration_windows: 4, report: null}}
evaluation: {{backend: transformers, forecast: true, workload: {{turns: 4, decode_steps: 4, prompt_tokens: 4}}}}
tracking: {{mlflow: false}}
"""


@pytest.fixture
def home(tmp_path, pico_llama):
    (tmp_path / "forecast.yaml").write_text(STUDY.format(home=tmp_path, model=pico_llama))
    return tmp_path


@pytest.fixture
def prepared(home):
    return settings.prepare(compose.load("forecast", config_dir=home))


def loss(nll):
    return Loss(nll, 0.001, abs(nll))


def damages(own):
    """Depth and width cost more the more is cut, W8A8 a little."""
    cut = dataclasses.replace
    return DamageTable(
        own,
        (
            Entry(cut(own, num_hidden_layers=4), loss(0.10)),
            Entry(cut(own, num_hidden_layers=2), loss(0.80)),
            Entry(cut(own, intermediate_size=80), loss(0.40)),
            Entry(cut(own, intermediate_size=128), loss(0.05)),
            Entry(cut(own, num_key_value_heads=1, num_attention_heads=2), loss(0.6)),
            Entry(cut(own, precision="W8A8"), loss(0.02)),
            Entry(cut(own, precision="W8A8", quantizer="gptq"), loss(0.01)),
        ),
    )


def speeds(prepared):
    """A layer takes 16% of a step, the MLP another 20%, and W8A8 costs 5%."""
    own = prepared.model.identity
    probes = []
    for changes, ratio in (
        ({"num_hidden_layers": 2}, 0.52),
        ({"intermediate_size": 80}, 0.9),
        ({"num_key_value_heads": 1, "num_attention_heads": 2}, 0.95),
        ({"precision": "W8A8"}, 1.05),
        ({"precision": "W8A8", "num_hidden_layers": 2}, 0.55),
    ):
        shape = speed_table.shape_of(prepared, dataclasses.replace(own, **changes))
        probes.append(Probe(shape, {1: ratio}, {1: 0.002}))
    return SpeedTable(speed_table.shape_of(prepared, own), {1: 2.0}, tuple(probes))


def view_of(prepared, times):
    made = Forecast(prepared, speeds(prepared), damages(prepared.model.identity))
    return outlook.view(made, 0.5, times)


def printed(view):
    console = rich.console.Console(width=160, record=True, file=io.StringIO())
    console.print(forecast_view.forecast_table(view))
    return console.export_text()


def test_a_step_is_split_into_the_gpus_time_and_the_hosts(prepared):
    rate = prepared.model.checkpoint.decode_bytes / 0.4e-3
    view = view_of(prepared, StepTimes({1: 1.5}, rate))
    (step,) = json.loads(json.dumps(view.to_dict()))["steps"]
    assert step == {
        "batch_size": 1,
        "wall_ms": 2.0,
        "busy_ms": 1.5,
        "busy_share": 0.75,
        "host_ms": 0.5,
        "floor_ms": pytest.approx(0.4),
    }
    assert view.floor_ms == pytest.approx(0.4)
    text = printed(view)
    assert "1.500 (75%)" in text
    assert "0.500" in text
    assert "0.400" in text


def test_without_a_profile_a_step_has_its_wall_time_alone(prepared):
    view = view_of(prepared, StepTimes())
    (step,) = view.to_dict()["steps"]
    assert (step["wall_ms"], step["busy_ms"], step["host_ms"], step["floor_ms"]) == (2.0, None, None, None)
    text = printed(view)
    assert "2.000 ms at batch 1" in text
    assert "GPU busy" not in text
    some = printed(view_of(prepared, StepTimes({}, 1e9)))  # the bandwidth alone
    assert "–" in some


def test_what_run_shows_says_that_nothing_can_win_where_nothing_can(prepared):
    """Where the best plan is no better than the base model beyond the error, a newcomer reads so before any trial."""
    own = prepared.model.identity
    shape = speed_table.shape_of(prepared, dataclasses.replace(own, num_hidden_layers=2))
    useless = SpeedTable(speed_table.shape_of(prepared, own), {1: 2.0}, (Probe(shape, {1: 1.0}, {1: 0.002}),))
    made = Forecast(prepared, useless, damages(own))
    console = rich.console.Console(width=160, record=True, file=io.StringIO())
    console.print(forecast_view.brief(outlook.view(made, 0.5, StepTimes())))
    text = console.export_text()
    assert "No plan of this space is forecast to beat the base model's 0.500" in text
    best = text[text.index("the best plans") :].splitlines()[2:]
    assert sum("H hidden" in line for line in best) == forecast_view.FEW
    assert forecast_view.FEW < 10


def test_step_times_are_kept_and_a_cpu_has_none(prepared):
    said = []
    assert step_times.step_times(prepared, None, said.append) == StepTimes()  # no engine is started
    assert said == []
    path = step_times.path_of(prepared)
    path.parent.mkdir(parents=True)
    kept = StepTimes({1: 1.5, 32: 2.25}, 3e12)
    path.write_text(json.dumps(kept.to_dict()))
    assert step_times.step_times(prepared, None, said.append) == kept
    path.write_text(json.dumps({**kept.to_dict(), "busy_ms": {"1": -1.0}}))
    assert step_times.step_times(prepared, None, said.append) == StepTimes()
    assert not path.exists()


def test_losses_of_single_cuts_add_up(prepared):
    own = prepared.model.identity
    table = damages(own)
    assert table.loss(own)[0] == 0.0
    assert table.loss(dataclasses.replace(own, num_hidden_layers=4))[0] == pytest.approx(0.10)
    both = dataclasses.replace(own, num_hidden_layers=4, intermediate_size=128, precision="W8A8")
    assert table.loss(both)[0] == pytest.approx(0.10 + 0.05 + 0.02)
    assert table.parts(both) == {
        "num_hidden_layers": pytest.approx(0.10),
        "intermediate_size": pytest.approx(0.05),
        "precision": pytest.approx(0.02),
    }
    gptq = dataclasses.replace(own, precision="W8A8", quantizer="gptq")
    assert table.loss(gptq)[0] == pytest.approx(0.01)


def with_choices(own):
    """FFN widths by energy and ridge, and at the middle level by each other choice alone."""
    cut = dataclasses.replace
    start = cut(own, importance="energy", repair="ridge")
    middle = cut(start, intermediate_size=120)
    return DamageTable(
        own,
        (
            Entry(cut(start, intermediate_size=80), loss(0.40)),
            Entry(middle, loss(0.20)),
            Entry(cut(start, intermediate_size=136), loss(0.08)),
            Entry(cut(own, num_hidden_layers=4, drop_from="kl"), loss(0.10)),
            Entry(cut(own, num_hidden_layers=3, drop_from="kl"), loss(0.30)),
            Entry(cut(middle, importance="activation"), loss(0.30)),
            Entry(cut(middle, repair="none"), loss(0.60)),
            Entry(cut(middle, repair="stream"), loss(0.10)),
            Entry(cut(own, num_hidden_layers=3, drop_from="importance"), loss(0.90)),
        ),
    )


def test_a_choice_changes_the_loss_of_the_cuts_that_it_goes_with_by_the_share_that_was_scored(prepared):
    own = prepared.model.identity
    table, cut = with_choices(own), dataclasses.replace

    def part(axis, **changes):
        return table.parts(cut(own, **changes))[axis]

    narrow = {"intermediate_size": 80, "importance": "energy"}
    assert part("intermediate_size", **narrow, repair="ridge") == pytest.approx(0.40)
    assert part("intermediate_size", **narrow, repair="stream") == pytest.approx(0.20, rel=0.05)
    assert part("intermediate_size", **narrow, repair="none") == pytest.approx(1.20, rel=0.05)
    both = {"intermediate_size": 80, "importance": "activation", "repair": "none"}  # each by itself
    assert part("intermediate_size", **both) == pytest.approx(0.40 * 1.5 * 3.0, rel=0.1)
    assert part("num_hidden_layers", num_hidden_layers=4, drop_from="kl") == pytest.approx(0.10)
    assert part("num_hidden_layers", num_hidden_layers=4, drop_from="importance") == pytest.approx(0.30, rel=0.05)
    of_both = cut(own, num_hidden_layers=3, drop_from="kl", **narrow, repair="stream")
    assert table.parts(of_both) == {
        "num_hidden_layers": pytest.approx(0.8 * 0.30),  # stream was not scored there
        "intermediate_size": pytest.approx(0.20, rel=0.05),
    }
    wide = {"intermediate_size": 80, "importance": "energy"}
    known, assumed = (table.loss(cut(own, **wide, repair=repair)) for repair in ("stream", "distill"))
    assert assumed[0] == pytest.approx(0.20)
    assert assumed[1] > known[1]  # nothing was scored
    learnt = table.loss(cut(own, **wide, repair="distill"), relative_error=0.05)
    assert learnt[1] < 0.5 * assumed[1]  # trials that show that forecasts are right, show that of what is assumed too
    quick = cut(own, **narrow, repair="ridge", precision="W8A8")
    assert table.share(cut(quick, repair="stream"), quick) == pytest.approx(0.5, rel=0.05)
    assert table.share(cut(own, precision="W8A8"), own) is None


def test_the_cheap_screen_expects_of_a_repair_what_the_table_foretells(prepared):
    own = prepared.model.identity
    narrow = dataclasses.replace(own, intermediate_size=80, importance="energy", repair="stream", precision="W8A8")
    distilled = dataclasses.replace(narrow, repair="distill")

    def foretold(plan, damage):
        trial = Objective(Bench.of(prepared), measurement(), silent, forecast=Forecast(prepared, None, damage))
        return trial._gain(optuna.create_study(), plan).share

    assert foretold(narrow, with_choices(own)) == pytest.approx(0.5, rel=0.05)
    assert foretold(narrow, None) == 0.8
    assert foretold(distilled, None) == 0.5


def test_losses_that_another_study_of_the_model_scored_are_used(prepared):
    """Studies of the same model and texts share a table, and may search other sizes and choices."""
    own, cut = prepared.model.identity, dataclasses.replace
    narrow = {"importance": "energy", "repair": "ridge"}
    others = {"importance": "flap", "repair": "ridge"}
    table = DamageTable(
        own,
        (
            Entry(cut(own, intermediate_size=80, **narrow), loss(0.40)),
            Entry(cut(own, intermediate_size=120, **narrow), loss(0.20)),
            Entry(cut(own, intermediate_size=88, **others), loss(0.90)),
            Entry(cut(own, intermediate_size=128, **others), loss(0.30)),
            Entry(cut(own, intermediate_size=100, importance="energy"), loss(0.75)),
        ),
    )

    def part(**changes):
        return table.parts(cut(own, **changes))["intermediate_size"]

    assert part(intermediate_size=88, **others) == pytest.approx(0.90)
    assert part(intermediate_size=80, **narrow) == pytest.approx(0.40)
    expected = 0.75 / part(intermediate_size=100, **narrow) * 0.20
    assert part(intermediate_size=120, importance="energy") == pytest.approx(expected, rel=0.05)


def test_noise_below_zero_is_no_gain_that_a_choice_multiplies(prepared):
    own, cut = prepared.model.identity, dataclasses.replace
    mild = cut(own, intermediate_size=144, importance="energy")
    table = DamageTable(own, (Entry(cut(mild, repair="ridge"), loss(-0.004)), Entry(mild, loss(0.03))))
    assert table.parts(mild)["intermediate_size"] >= -0.004
    assert table.loss(mild)[0] >= 0.0


def test_the_table_scores_every_choice_of_the_space_at_one_level(prepared, monkeypatch):
    monkeypatch.setattr(damage_plans, "LEFT_OUT_ON_A_CPU", ())
    own = prepared.model.identity
    searched = prepared.file.space.model_copy(
        update={
            "drop_from": ["kl", "importance"],
            "hidden_size": Range(low=76, high=96, step=4),
            "intermediate_size": Range(low=80, high=160, step=8),
            "importance": ["energy", "activation"],
            "repair": ["stream", "distill"],
            "quantizer": ["nearest", "gptq"],
        }
    )
    study = dataclasses.replace(prepared, file=prepared.file.model_copy(update={"space": searched}))
    plans = damage_plans.wanted(study)
    assert len(set(plans)) == len(plans)
    cut = dataclasses.replace
    narrow = cut(own, intermediate_size=120, importance="energy", repair="ridge")
    assert {cut(narrow, importance="activation"), cut(narrow, repair="stream")} < set(plans)
    drops = {(plan.drop_from, plan.repair) for plan in plans if plan.num_hidden_layers == 4}
    assert drops == {("kl", "none"), ("importance", "none"), ("kl", "stream")}
    assert not any(plan.repair == "distill" for plan in plans)  # it takes minutes
    thin = [plan.hidden_size for plan in plans if plan.hidden_size != own.hidden_size]
    assert set(thin) == {78, 84}  # six heads do not divide 76, the lowest size of the space
    assert {plan.quantizer for plan in plans if plan.precision == "W8A8"} == {"nearest", "gptq"}


def test_where_ridge_breaks_a_repair_is_scored_at_the_strongest_cut_too_and_has_a_curve_of_its_own(
    prepared, monkeypatch
):
    monkeypatch.setattr(damage_plans, "LEFT_OUT_ON_A_CPU", ())
    own, cut = prepared.model.identity, dataclasses.replace
    searched = prepared.file.space.model_copy(
        update={
            "intermediate_size": Range(low=80, high=160, step=8),
            "num_key_value_heads": None,
            "num_attention_heads": None,
            "importance": ["energy"],
            "repair": ["stream"],
            "precision": None,
        }
    )
    study = dataclasses.replace(prepared, file=prepared.file.model_copy(update={"space": searched}))
    narrow, middle = (cut(own, intermediate_size=size, importance="energy", repair="ridge") for size in (80, 120))
    assert {narrow, middle, cut(middle, repair="stream")} <= set(damage_plans.wanted(study))
    assert damage_plans.where_ridge_breaks(study, {narrow: 0.9, middle: 2.0}) == []
    again = damage_plans.where_ridge_breaks(study, {narrow: 1.6})
    assert again == [cut(narrow, repair="stream")]

    scored = {narrow: 1.6, middle: 1.1, cut(middle, repair="stream"): 0.15, again[0]: 0.45}
    monkeypatch.setattr(damage_table, "_scored", lambda screener, plan, base, say, on_own: loss(scored.get(plan, 0.0)))
    table = damage_table.damage_table(study, Screener(study), silent)
    assert table.parts(again[0])["intermediate_size"] == pytest.approx(0.45)  # and not .15 · 1.6 / 1.1
    between = table.parts(cut(own, intermediate_size=104, importance="energy", repair="stream"))["intermediate_size"]
    assert 0.15 < between < 0.45


def test_scales_that_learn_are_forecast_to_lose_less_than_rounding_and_that_is_no_certainty(prepared):
    own, cut = prepared.model.identity, dataclasses.replace
    rounded = cut(own, precision="W4A16")
    table = DamageTable(own, (Entry(rounded, loss(0.1)),))
    (plain, its_error), (learnt, error) = (table.loss(plan) for plan in (rounded, cut(rounded, repair="distill")))
    assert plain == pytest.approx(0.1)
    assert learnt == pytest.approx(0.07)
    assert error / learnt > its_error / plain


@pytest.mark.long
def test_stream_is_scored_with_few_tokens_and_leaves_no_file(prepared, monkeypatch):
    searched = prepared.file.space.model_copy(update={"repair": ["stream"], "precision": None})
    study = dataclasses.replace(prepared, file=prepared.file.model_copy(update={"space": searched}))
    fitted = []
    refit = stream.refit

    def spy(cut, base, family, stays, parts, windows, *rest, **named):
        fitted.append({name: len(some) for name, some in windows.items()})
        return refit(cut, base, family, stays, parts, windows, *rest, **named)

    monkeypatch.setattr(stream, "refit", spy)
    assert not any(plan.repair == "stream" for plan in damage_plans.wanted(study))  # on a CPU it takes minutes
    monkeypatch.setattr(damage_plans, "LEFT_OUT_ON_A_CPU", ())
    monkeypatch.setattr("search.stages.build.TOKENS", 3 * 3 * 32)
    table = damage_table.damage_table(study, Screener(study), silent)
    scored = [entry for entry in table.entries if entry.plan.repair == "stream"]
    assert len(scored) == len(fitted) == 3  # depth, key/value heads and width
    assert all(counts == dict.fromkeys(("topics", "docstrings", "code"), 3) for counts in fitted)
    assert not list(study.outputs.rglob("stream-*"))
    whole = Screener(study).screen(scored[0].plan, silent)  # a trial's own repair takes all of the text
    assert all(count > 3 for count in fitted[-1].values())
    assert whole.nll
    assert list(study.outputs.rglob("stream-*.safetensors"))


def test_between_levels_a_loss_lies_between_theirs_and_grows_with_the_cut(prepared):
    own = prepared.model.identity
    table = damages(own)
    losses = [table.loss(dataclasses.replace(own, intermediate_size=size))[0] for size in range(160, 79, -8)]
    assert losses == sorted(losses)
    assert losses[0] == 0.0
    assert losses[-1] == pytest.approx(0.40)
    below = table.loss(dataclasses.replace(own, intermediate_size=72))[0]
    assert below > 0.40
    errors = [table.loss(dataclasses.replace(own, intermediate_size=size))[1] for size in (144, 80)]
    assert errors[0] < errors[1]


def test_a_forecast_weighs_loss_and_speed_as_the_score_does(prepared):
    made = Forecast(prepared, speeds(prepared), damages(prepared.model.identity))
    plan = dataclasses.replace(prepared.model.identity, num_hidden_layers=4)
    expected = made.expected(plan)
    assert expected.perf_norm == pytest.approx(math.exp(-0.10))
    assert expected.speed_norm == pytest.approx(0.16, abs=0.01)
    assert expected.score == pytest.approx(0.5 * expected.perf_norm + 0.5 * expected.speed_norm)
    own = made.expected(prepared.model.identity)
    assert own.score == pytest.approx(0.5, abs=0.005)


def test_a_damage_table_survives_json(prepared):
    table = damages(prepared.model.identity)
    assert DamageTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_the_best_plans_are_those_of_the_whole_space(prepared):
    made = Forecast(prepared, speeds(prepared), damages(prepared.model.identity))
    searched, own = prepared.file.space, prepared.model.identity
    every = {
        space.plan_of(
            {
                "num_hidden_layers": layers,
                "intermediate_size": ffn,
                "num_key_value_heads": groups,
                "precision": precision,
            },
            searched,
            own,
        )
        for layers in range(2, 6)
        for ffn in range(80, 161, 8)
        for groups in (1, 2, 3)
        for precision in ("bfloat16", "W8A8")
    }
    feasible = [plan for plan in every if prepared.infeasible(plan) is None]
    best = max(made.expected(plan).score for plan in feasible)
    shown = ForecastSampler(made, seed=1).best_plans(10)
    assert len(shown) == len(set(shown)) == 10
    scores = [made.expected(plan).score for plan in shown]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(best)


def searched_best(prepared, truth, trials, seed):
    """Run a study whose Scores are `truth`, a function of plan and forecast; return the plans in their order."""
    made = Forecast(prepared, speeds(prepared), damages(prepared.model.identity))
    study = optuna.create_study(direction="maximize")
    for params in space.uncut(prepared.file.space, prepared.model.identity)[:1]:  # as `run` begins
        study.enqueue_trial(params)
    plans = []
    for number in range(trials + 1):
        study.sampler = ForecastSampler(made, seed=100 * seed + number)
        trial = study.ask()
        plan = space.suggest(trial, prepared.file.space, prepared.model.identity)
        plans.append(plan)
        study.tell(trial, truth(plan, made.expected(plan)))
    return plans[1:]


def test_no_plan_is_proposed_twice(prepared):
    plans = searched_best(prepared, lambda plan, expected: expected.score, 12, seed=1)
    assert len(set(plans)) == 12


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_sampler_learns_where_the_forecast_is_wrong(prepared, seed):
    """Every cut of depth costs .2 more than forecast: plans that keep their layers are found all the same."""

    def truth(plan: CompressionPlan, expected: Score) -> float:
        return expected.score - 0.2 * (plan.num_hidden_layers < 5) + 0.05 * (plan.intermediate_size == 120)

    plans = searched_best(prepared, truth, 12, seed)
    made = Forecast(prepared, speeds(prepared), damages(prepared.model.identity))
    assert plans[0].num_hidden_layers < 5  # as the forecast has it
    scores = [truth(plan, made.expected(plan)) for plan in plans]
    assert max(scores) > 0.5
    assert sum(plan.num_hidden_layers == 5 for plan in plans[6:]) >= 4


def test_pruned_trials_teach_the_sampler(prepared):
    made = Forecast(prepared, speeds(prepared), damages(prepared.model.identity))
    study = optuna.create_study(direction="maximize", sampler=ForecastSampler(made, 0))
    trial = study.ask()
    space.suggest(trial, prepared.file.space, prepared.model.identity)
    for step, value in enumerate((0.3, 0.4), start=1):
        trial.report(value, step)
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    (observed,) = ForecastSampler(made, 0).observations(
        study.trials, space.distributions(prepared.file.space, prepared.model.identity)
    )
    assert observed.value == pytest.approx(0.35)


def test_where_steps_take_long_the_fewest_plans_are_timed_and_one_checks_them(prepared):
    plans, own = speed_table.probes(prepared), prepared.model.identity
    shallow, narrow, other = (plan for plan, check in plans if not check)
    assert (shallow.num_hidden_layers, narrow.intermediate_size, other.precision) == (2, 80, "W8A8")
    assert narrow.num_key_value_heads == 1
    assert dataclasses.replace(other, precision=own.precision) == own
    ((middle, _),) = (pair for pair in plans if pair[1])
    assert middle.precision == "W8A8"
    assert 2 < middle.num_hidden_layers < own.num_hidden_layers
    assert 80 < middle.intermediate_size < own.intermediate_size
    space = prepared.file.space.model_copy(update={"num_hidden_layers": None, "precision": None})
    of_width = dataclasses.replace(prepared, file=prepared.file.model_copy(update={"space": space}))
    assert [check for _, check in speed_table.probes(of_width)] == [False, True]  # nobody asks what a layer takes


def test_a_width_of_which_little_is_cut_is_timed_narrower(prepared):
    """A slope over a twentieth of the FFN would be lost in the noise of two timings."""
    light = Range(low=152, high=160, step=8)
    space = prepared.file.space.model_copy(update={"intermediate_size": light, "num_key_value_heads": None})
    setting = dataclasses.replace(prepared, file=prepared.file.model_copy(update={"space": space}))
    _, narrow, _ = (plan for plan, check in speed_table.probes(setting) if not check)
    assert narrow.intermediate_size == 120
    ((middle, _),) = (pair for pair in speed_table.probes(setting) if pair[1])
    assert middle.intermediate_size == 152  # what is checked is a plan of the space


@pytest.mark.long
def test_no_model_is_timed_for_a_forecast_where_no_time_decides(home, prepared):
    sized = settings.prepare(compose.load("forecast", ['goal={minimize: size, perf_norm: ">= 0.9"}'], home))
    with Bench.of(sized) as bench:
        assert bench.begin(silent, forecast=True).time_per_token_ms is not None
    assert speed_table.known(sized) is None
    made = Forecast.known(sized)
    assert made.complete
    assert made.damage is not None
    assert not Forecast(prepared, None, made.damage).complete
    assert Forecast(prepared, speeds(prepared), made.damage).complete


def test_a_plan_is_laid_out_once_for_its_size_and_its_predicted_time(prepared, monkeypatch):
    plan, counted = dataclasses.replace(prepared.model.identity, intermediate_size=80), []
    plain = build.shapes
    monkeypatch.setattr(build, "shapes", lambda *given: counted.append(given[0]) or plain(*given))
    made = Forecast(prepared, None, None)
    for _ in range(3):
        assert made.time_ratio(plan)[0] < 1.0
        assert prepared.size_ratio(plan) < 1.0
    assert counted == [plan]


def test_the_error_of_a_precisions_loss_counts(prepared):
    own = prepared.model.identity
    narrow = dataclasses.replace(own, precision="W4A16")
    for error in (0.0, 0.05):
        table = DamageTable(own, (Entry(narrow, Loss(0.04, error, None)),))
        assert table.loss(narrow, 0.0)[1] == pytest.approx(math.hypot(error, damage_table.LEAST_ERROR))


def test_the_precision_that_is_forecast_to_do_best_is_tried_first(prepared):
    """The base model itself comes before all; without a forecast the study file's order stays."""
    precisions = ["float16", "W8A8", "bfloat16", "FP8_DYNAMIC"]
    space = prepared.file.space.model_copy(update={"precision": precisions})
    setting = dataclasses.replace(prepared, file=prepared.file.model_copy(update={"space": space}))
    own, cut = setting.model.identity, dataclasses.replace
    ratios = {"float16": 1.1, "W8A8": 0.9, "FP8_DYNAMIC": 0.95}
    shapes = {name: speed_table.shape_of(setting, cut(own, precision=name)) for name in ratios}
    probes = tuple(Probe(shapes[name], {1: ratio}, {1: 0.001}) for name, ratio in ratios.items())
    table = SpeedTable(speed_table.shape_of(setting, own), {1: 2.0}, probes)

    def queued(forecast: Forecast) -> list[str]:
        study = optuna.create_study()
        workers._enqueue_uncut(study, setting, forecast)
        return [trial.system_attrs["fixed_params"]["precision"] for trial in study.trials]

    assert queued(Forecast(setting, table, damages(own))) == ["bfloat16", "W8A8", "FP8_DYNAMIC", "float16"]
    assert queued(Forecast(setting, None, None)) == ["bfloat16", "float16", "W8A8", "FP8_DYNAMIC"]


def test_probes_are_plans_that_the_engine_serves_and_leave_no_precision_out(prepared):
    prepared = dataclasses.replace(prepared, machine=dataclasses.replace(prepared.machine, device="cuda"))
    plans = speed_table.probes(prepared)
    assert all(prepared.infeasible(plan) is None for plan, _ in plans)
    assert len({speed_table.shape_of(prepared, plan) for plan, _ in plans}) == len(plans)
    assert {plan.precision for plan, check in plans if not check} == {"bfloat16", "W8A8"}
    assert {plan.num_hidden_layers for plan, check in plans if not check} == {2, 5}
    assert any(check for _, check in plans)


@pytest.mark.long
def test_a_study_with_a_forecast_times_and_scores_single_cuts_and_prunes_by_them(home, cli):
    ended = cli("run", "--study", "forecast", "--config-dir", home, "--json", "sampler.name=forecast", cwd=home)
    assert ended.status == 0, ended.err
    assert ended.err.index("what pays") < ended.err.index("what it costs") < ended.err.index("trial   0")
    again = cli("run", "--study", "forecast", "--config-dir", home, "--json", "sampler.name=forecast", cwd=home)
    assert (again.status, "what pays" in again.err) == (0, False)  # who continues has seen it
    (speed_file,) = (home / "outputs/forecast").glob("speed-*.json")
    (damage_file,) = (home / "outputs/forecast").glob("damage-*.json")
    made = SpeedTable.from_dict(json.loads(speed_file.read_text()))
    assert {probe.shape.precision for probe in made.probes} == {"bfloat16", "W8A8"}
    assert not list((home / "outputs/forecast").glob("probes-*"))
    study = optuna.load_study(study_name="forecast", storage=f"sqlite:///{home}/studies.db")
    foreseen = [trial for trial in study.trials if "forecast_score" in trial.user_attrs]
    assert foreseen
    assert all(math.isfinite(trial.user_attrs["forecast_score"]) for trial in foreseen)
    before = {file: file.stat().st_mtime_ns for file in (speed_file, damage_file)}
    view = cli("forecast", "--study", "forecast", "--config-dir", home, "--json", cwd=home)
    assert view.status == 0, view.err
    assert {file: file.stat().st_mtime_ns for file in before} == before  # nothing is measured twice
    assert len(view.json["best"]) == 10
    assert view.json["pays"][0]["precision"] == "bfloat16"
    front = view.json["front"]
    assert [each["perf_norm"] for each in front] == sorted((each["perf_norm"] for each in front), reverse=True)
    assert [each["speed_norm"] for each in front] == sorted(each["speed_norm"] for each in front)
    assert max(each["score"] for each in front) == pytest.approx(view.json["best"][0]["score"])
    table = cli("forecast", "--study", "forecast", "--config-dir", home, "--plot", "f.png", cwd=home)
    assert table.status == 0, table.err
    assert (home / "f.png").read_bytes().startswith(b"\x89PNG")
    refused = cli("forecast", "--study", "forecast", "--config-dir", home, "--plot", "f.pdf", cwd=home)
    assert refused.status == 2
    assert ".png or .html" in refused.err
    assert "what pays" in table.out
    assert "what it costs" in table.out
    assert "the best plans" in table.out
    assert Path(home / "outputs").is_dir()


def climbed(prepared, truth, full, seed, *, waits=True):
    """Run a study with a cheap screen until `full` plans went through it; return their values and all trials."""
    made = Forecast(prepared, speeds(prepared), damages(prepared.model.identity))
    noise = random.Random(seed)
    study = optuna.create_study(direction="maximize")
    for params in space.uncut(prepared.file.space, prepared.model.identity)[:1]:
        study.enqueue_trial(params)
    values = []
    while len(values) <= full:
        sampler = study.sampler = ForecastSampler(made, seed=100 * seed + len(study.trials))
        trial = study.ask()
        plan = space.suggest(trial, prepared.file.space, prepared.model.identity)
        value = truth(plan, made.expected(plan))
        trial.report(made.expected(plan).score, rungs.FORECAST)
        trial.report(value + noise.gauss(0.0, 0.003), rungs.cheap(len(prepared.texts.shards)))
        frozen = trial.storage.get_trial(trial._trial_id)
        why = sampler.promises_more(study, frozen) if waits and values else None
        if why is None:
            study.tell(trial, value)
            values.append(value)
        else:
            trial.storage.set_trial_system_attr(trial._trial_id, WAITS, why)
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return values[1:], study.trials


@pytest.mark.parametrize("seed", [1, 2])
def test_plans_that_promise_less_wait_so_that_fewer_are_repaired(prepared, seed):
    def truth(plan: CompressionPlan, expected: Score) -> float:
        return expected.score - 0.2 * (plan.num_hidden_layers < 5) + 0.05 * (plan.intermediate_size == 120)

    values, trials = climbed(prepared, truth, 5, seed)
    without, _ = climbed(prepared, truth, 5, seed, waits=False)
    assert sum(values[:4]) > sum(without[:4])
    assert max(values) >= max(without) - 0.005
    waited = [WAITS in trial.system_attrs for trial in trials]
    assert any(waited)
    longest = max(len(list(group)) for waits, group in itertools.groupby(waited) if waits)
    assert longest <= WAIT_IN_A_ROW
    plans = [tuple(trial.params.items()) for trial, waits in zip(trials, waited, strict=True) if waits]
    assert len(set(plans)) == len(plans)  # a plan waits once: proposed again, it goes on
    finished = [tuple(trial.params.items()) for trial, waits in zip(trials, waited, strict=True) if not waits]
    assert len(set(finished)) == len(finished)


def test_a_plan_that_waits_teaches_until_it_goes_on(prepared):
    def truth(plan: CompressionPlan, expected: Score) -> float:
        return expected.score - 0.2 * (plan.num_hidden_layers < 5)

    _, trials = climbed(prepared, truth, 3, seed=1)
    made = Forecast(prepared, speeds(prepared), damages(prepared.model.identity))
    seen = ForecastSampler(made, 0).observations(
        trials, space.distributions(prepared.file.space, prepared.model.identity)
    )
    plans = [tuple(each.params.items()) for each in seen]
    assert len(set(plans)) == len(plans)
    assert len(plans) > 4


def test_trials_that_were_stopped_do_not_end_the_row_of_those_that_wait():
    states = optuna.trial.TrialState

    def ended(state, **attributes):
        return optuna.trial.create_trial(
            state=state,
            value=0.5 if state == states.COMPLETE else None,
            user_attrs={"failure": "Interrupted"} if state == states.FAIL else {},
            system_attrs=attributes,
        )

    waits = [ended(states.PRUNED, waits="another promises more") for _ in range(2)]
    assert forecast_sampler._waits_in_a_row([ended(states.COMPLETE), *waits, ended(states.FAIL), waits[0]]) == 3
    assert forecast_sampler._waits_in_a_row([*waits, ended(states.COMPLETE), waits[0]]) == 1


# -- what can't be scored, and what two runs make together -----------------------------------------------------


def test_a_plan_whose_loss_is_nan_is_kept_as_one_that_knows_nothing_and_ends_no_run(prepared, monkeypatch):
    """float16 ends at 65504."""
    own, told = prepared.model.identity, []
    plans = [dataclasses.replace(own, precision="float16"), dataclasses.replace(own, num_hidden_layers=4)]
    monkeypatch.setattr(damage_plans, "wanted", lambda setting: plans)
    checkpoint = prepared.model.checkpoint

    def scaled(name, factor):
        key = f"model.layers.0.self_attn.{name}_proj.weight"
        tensor = checkpoint.tensors[key]
        return {key: dataclasses.replace(tensor, load=lambda: tensor.load() * factor)}

    tensors = {**checkpoint.tensors, **scaled("v", 2.0**20), **scaled("o", 2.0**-20)}  # the same model in bfloat16
    prepared = dataclasses.replace(
        prepared, model=dataclasses.replace(prepared.model, checkpoint=dataclasses.replace(checkpoint, tensors=tensors))
    )
    table = damage_table.damage_table(prepared, Screener(prepared), told.append)
    assert [entry.plan for entry in table.entries] == plans
    assert table.loss(plans[0])[0] == damage_table.BROKEN
    assert table.loss(plans[1])[0] < damage_table.BROKEN
    assert any("this plan breaks the model" in line for line in told)
    assert damage_table.known(prepared).entries == table.entries


def test_two_runs_add_to_one_damage_table(prepared, monkeypatch):
    wanted, asked = damage_plans.wanted(prepared), []
    other = dataclasses.replace(prepared.model.identity, num_hidden_layers=1)
    assert other not in wanted

    def scored(screener, plan, base, say, on_own):
        asked.append(plan)
        if len(asked) == 1:  # meanwhile, another run keeps what it has scored
            theirs = (Entry(other, loss(0.7)), Entry(wanted[-1], loss(0.2)))
            damage_table._keep(prepared, DamageTable(prepared.model.identity, theirs))
        return loss(0.1)

    monkeypatch.setattr(damage_table, "_scored", scored)
    table = damage_table.damage_table(prepared, Screener(prepared), silent)
    assert asked == wanted[:-1]
    assert {entry.plan for entry in damage_table.known(prepared).entries} == {*wanted, other}
    assert damage_table.known(prepared).entries == table.entries


def test_what_could_not_be_scored_is_not_forecast_to_lose_nothing(prepared, monkeypatch):
    """Memory ran out for W8A8 and for one depth."""
    own, cheap = prepared.model.identity, Screener.cheap
    plans = [dataclasses.replace(own, **changes) for changes in (
        {"precision": "W8A8"}, {"num_hidden_layers": 4}, {"intermediate_size": 128})]  # fmt: skip
    monkeypatch.setattr(damage_plans, "wanted", lambda setting: plans)

    def without_memory(self, plan, say):
        if plan in plans[:2]:
            raise MemoryError
        return cheap(self, plan, say)

    monkeypatch.setattr(Screener, "cheap", without_memory)
    table = damage_table.damage_table(prepared, Screener(prepared), silent)
    assert [entry.plan for entry in table.entries] == plans[2:]
    for plan in plans[:2]:
        loss, error = table.loss(plan)
        assert loss == damage_table.NOT_SCORED
        assert error >= damage_table.NOT_SCORED
    damage_table.while_writing(prepared, Screener(prepared), plans, silent)  # the same beside the writing ends nothing


def test_another_text_or_method_makes_another_damage_table(prepared, home, monkeypatch):
    def path(*words):
        return damage_table.path_of(settings.prepare(compose.load("forecast", list(words), home)))

    own = path()
    assert own == path("space.num_hidden_layers={low: 3, high: 5}")
    (home / "more.txt").write_text("\n\n".join(f"Paragraph {place} says something else." for place in range(400)))
    others = [path("text.moments_windows=8"), path("text.calibration=[embedded, self]"),
              path(f"text.calibration=[embedded, {home}/more.txt]")]  # fmt: skip
    monkeypatch.setattr(damage_table.build, "all_versions", lambda: ["stream-99"])
    assert len({own, *others, path()}) == 5


@pytest.mark.long
def test_two_runs_share_a_speed_table(prepared):
    """What the other has timed meanwhile is neither timed again nor lost."""
    missing = [plan for plan, _ in speed_table.missing(prepared)]
    with Engines(prepared) as engines:
        group = SideBySide(prepared, engines, missing[:2])
        theirs = SpeedTable(
            speed_table.shape_of(prepared, prepared.model.identity),
            {1: 2.0},
            (Probe(speed_table.shape_of(prepared, missing[0]), {1: 0.123}, {1: 0.001}),),
        )
        cached.keep_json(speed_table.path_of(prepared), theirs.to_dict())
        table = speed_table.speed_table(prepared, engines, silent, types.SimpleNamespace(take=lambda: group))
    shapes = {probe.shape: probe for probe in table.probes}
    assert shapes[speed_table.shape_of(prepared, missing[0])].ratio == {1: 0.123}
    assert set(shapes) == {speed_table.shape_of(prepared, plan) for plan in missing}
    later = dataclasses.replace(theirs, probes=(Probe(theirs.base, {1: 1.5}, {1: 0.001}),))
    assert len(speed_table._keep(prepared, later).probes) == len(table.probes) + 1


@pytest.mark.parametrize(("of_task", "may_win"), [(0.9, False), (1.2, True)])
def test_a_task_counts_as_the_most_that_it_can_give(home, of_task, may_win):
    """A quarter of PerfNorm is perplexity: of 4 layers the table tells .905, and their SpeedNorm is .16."""
    (home / "quiz.jsonl").write_text('{"prompt": "One and one is", "answer": "two"}\n')
    task = f"{{metric: generation, name: quiz, files: ['{home}/quiz.jsonl'], match: exact, weight: 3}}"
    words = [f"evaluation.perf=[{{metric: perplexity, weight: 1}}, {task}]"]
    prepared = settings.prepare(compose.load("forecast", words, home))
    made = Forecast(prepared, speeds(prepared), damages(prepared.model.identity), most_of_tasks={"quiz": of_task})
    plan = dataclasses.replace(prepared.model.identity, num_hidden_layers=4)
    possible, text = made.possible(plan).score, made.expected(plan)
    assert possible.perf_norm == pytest.approx(0.25 * text.perf_norm + 0.75 * of_task)
    assert possible.perf_norm_se == pytest.approx(0.25 * text.perf_norm_se)
    assert possible.score == pytest.approx(0.5 * possible.perf_norm + 0.5 * text.speed_norm)
    assert prepared.goal.can_beat(made.possible(plan), 0.57) == may_win
    assert math.isinf(made.known_of(plan).score.perf_norm_se)
    assert math.isinf(Forecast(prepared, None, None, most_of_tasks={"quiz": 1.0}).possible(plan).score.perf_norm_se)


def test_without_a_table_the_error_of_predicted_times_leaves_a_plan_its_chance(prepared):
    """W8A8 is predicted to be faster than it is on many GPUs; a cut that is predicted right must not lose to that."""
    made = Forecast(prepared, None, None)
    plan = dataclasses.replace(prepared.model.identity, num_hidden_layers=4)
    expected = made.of_loss(plan, 0.02, 0.005)
    leader = expected.score + 0.05
    assert prepared.goal.can_beat(made.possible(plan, expected, by_bytes=True), leader)
    assert not prepared.goal.can_beat(made.possible(plan, expected, by_bytes=True), leader + 0.1)
    assert math.isinf(made.possible(plan, expected).score.score_se)


def test_where_speed_counts_for_nothing_its_unknown_error_does_not_either(home):
    words = ("score.weight_perf=1", "score.weight_speed=0")
    prepared = settings.prepare(compose.load("forecast", list(words), home))
    made = Forecast(prepared, None, damages(prepared.model.identity))
    plan = dataclasses.replace(prepared.model.identity, num_hidden_layers=4)
    possible, known = made.possible(plan), made.known_of(plan)
    assert possible.score.score_se == pytest.approx(known.score.score_se)
    assert not prepared.goal.can_beat(possible, 1.5)
    assert prepared.goal.can_beat(possible, 0.8)


def test_workers_that_begin_together_do_not_propose_the_same_plan(home):
    file = compose.load("forecast", ["sampler.name=forecast", "trials=20"], home)
    prepared = settings.prepare(file)
    study = storage.create_or_resume(storage.open_storage(file.storage), "forecast", keys.definition(prepared))
    made = Forecast(prepared, speeds(prepared), damages(prepared.model.identity))
    for number, params in enumerate(space.uncut(file.space, prepared.model.identity)):
        study.add_trial(optuna.trial.create_trial(
            value=0.5 - 0.1 * number, params=params,
            distributions=space.distributions(file.space, prepared.model.identity),
        ))  # fmt: skip
    running = [one_trial.take(study, prepared, worker, made) for worker in range(3)]
    plans = [trial.user_attrs["plan"] for trial in running]  # known to the others before anything is run
    assert len({CompressionPlan.from_dict(plan) for plan in plans}) == 3
    assert [space.suggest(trial, file.space, prepared.model.identity).to_dict() for trial in running] == plans


@pytest.mark.parametrize("tasks", [(), (object(),)])
def test_text_rules_no_plan_out_where_tasks_count(prepared, tasks):
    prepared = dataclasses.replace(prepared, tasks=tasks)
    made = Forecast(prepared, speeds(prepared), damages(prepared.model.identity))
    study = optuna.create_study(direction="maximize", sampler=ForecastSampler(made, 0))
    for params in space.uncut(prepared.file.space, prepared.model.identity)[:1]:
        study.enqueue_trial(params)
    for _ in range(2):
        trial = study.ask()
        space.suggest(trial, prepared.file.space, prepared.model.identity)
        study.tell(trial, 0.95)  # more than any plan is forecast to score
    assert (NOTHING_LEFT in study.trials[-1].system_attrs) == (not tasks)
