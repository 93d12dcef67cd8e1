"""Goals with bounds: their arithmetic, what is refused, and real studies that end with the best feasible trial."""

import dataclasses
import json
import math

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import TrialState, create_trial

from evaluator import confirmed, speed
from evaluator.confirmed import Estimate
from evaluator.score import Score
from evaluator.speed_table import Probe, SpeedTable
from search.config import compose
from search.config.goal import GoalSection
from search.errors import ConfigError, StudyMismatch
from search.setup import setting as settings
from search.setup.definition import of_file
from search.setup.goal import Bound, Goal, Known
from search.show import goal_text
from search.stages import speed_table
from search.stages.damage_curves import Loss
from search.stages.damage_table import DamageTable, Entry
from search.stages.forecast import Forecast
from search.study import best, chance, constraints, ending, rungs, samplers, space, status
from search.study import storage as study_storage
from search.study import trials as study_trials
from search.study.forecast_sampler import NOTHING_LEFT, ForecastSampler
from search.study.screening import Screening

SMALL = Goal("size", (Bound("perf_norm", 0.97),))
FAST = Goal("time_per_token", (Bound("perf_norm", 0.99),))
GOOD = Goal("perf_norm", (Bound("speed_norm", 0.4),))
BOTH = Goal("score", (Bound("perf_norm", 0.9),))


def known(perf=1.0, perf_se=0.0, speed=0.0, speed_se=0.0, size=1.0):
    score = Score(perf, perf_se, speed, speed_se, 0.5 * perf + 0.5 * speed, 0.5 * math.hypot(perf_se, speed_se))
    return Known(score, size)


# -- arithmetic ------------------------------------------------------------------------------------------------


def test_a_value_is_larger_for_better_plans_and_is_0_for_the_base_model_where_less_is_wanted():
    plan = known(perf=0.98, speed=0.3, size=0.6)
    assert [goal.value(plan) for goal in (Goal(), SMALL, FAST, GOOD)] == pytest.approx([0.64, 0.4, 0.3, 0.98])
    assert [goal.value(known()) for goal in (Goal(), SMALL, FAST, GOOD)] == [0.5, 0.0, 0.0, 1.0]
    assert Goal("speed_norm").value(plan) == FAST.value(plan)
    assert SMALL.value_se(known(perf_se=0.1, speed_se=0.1)) == 0.0
    assert FAST.value_se(known(speed_se=0.1)) == 0.1


def test_a_constraint_is_bound_minus_value():
    assert SMALL.constraints(known(perf=0.95)) == {"perf_norm": pytest.approx(0.02)}
    assert SMALL.constraints(known(perf=0.98)) == {"perf_norm": pytest.approx(-0.01)}
    assert GOOD.constraints(known(speed=0.5)) == {"speed_norm": pytest.approx(-0.1)}
    assert Goal().constraints(known()) == {}
    assert SMALL.reaches(known(perf=0.97))
    assert not SMALL.reaches(known(perf=0.9699))


def test_a_bound_is_surely_missed_by_two_standard_errors_and_not_where_nothing_is_known():
    assert SMALL.broken(known(perf=0.95, perf_se=0.009)) == Bound("perf_norm", 0.97)
    assert SMALL.broken(known(perf=0.95, perf_se=0.011)) is None
    assert SMALL.broken(known(perf=0.1, perf_se=math.inf)) is None
    assert SMALL.broken(known(perf=0.1).without_forecast()) is None


def test_a_size_has_to_be_smaller_and_other_values_may_equal_the_best():
    assert not SMALL.can_beat(known(size=0.6), 0.4)
    assert not SMALL.can_beat(known(size=0.59999), 0.4)  # another header of the same weights
    assert SMALL.can_beat(known(size=0.59), 0.4)
    assert not SMALL.can_beat(known(size=0.61).without_forecast(), 0.4)
    assert FAST.can_beat(known(speed=0.3), 0.3)
    assert FAST.can_beat(known(speed=0.28, speed_se=0.01), 0.3)
    assert not FAST.can_beat(known(speed=0.28, speed_se=0.009), 0.3)


@pytest.mark.parametrize(
    ("goal", "value", "lost"),
    [
        (Goal(), None, None),
        (Goal(), 0.6, 1 - (0.6 - 0.5 * 0.95) / 0.5),
        (SMALL, 0.4, None),
        (FAST, 0.3, 0.7),
        (FAST, None, None),
        (GOOD, 0.98, 0.6),  # its bound alone: PerfNorm is known before
        (GOOD, None, 0.6),
        (Goal("score", (Bound("speed_norm", 0.2),)), 0.6, 1 - (0.6 - 0.5 * 0.95) / 0.5),
        (Goal("score", (Bound("speed_norm", 0.3),)), 0.6, 0.7),
    ],
)
def test_timing_ends_where_the_goal_is_surely_missed(goal, value, lost):
    assert goal.lost_above(value, 0.95, (0.5, 0.5)) == (None if lost is None else pytest.approx(lost))


def test_the_error_that_is_wanted_is_that_of_what_the_goal_asks_for():
    assert [goal.time_ratio_se(0.003, 0.5) for goal in (Goal(), SMALL)] == [0.006, math.inf]  # its times are told alone
    assert [goal.time_ratio_se(0.003, 0.5) for goal in (FAST, GOOD)] == [0.003, 0.003]
    assert [goal.time_ratio_se(0.003, 0.0) for goal in (Goal(), FAST)] == [math.inf, 0.003]
    assert {goal.time_ratio_se(0.0, 0.5) for goal in (Goal(), SMALL, FAST, GOOD)} == {0.0}  # all turns


def test_times_are_wanted_where_they_decide_anything():
    fast = (Bound("speed_norm", 0.1),)
    assert Goal().wants_time(0.5)
    assert not Goal().wants_time(0.0)
    assert Goal("time_per_token").wants_time(0.0)
    assert not SMALL.wants_time(0.5)
    assert Goal("size", fast).wants_time(0.0)
    assert not Goal("perf_norm").wants_time(0.5)
    assert Goal("perf_norm", fast).wants_time(0.5)


@pytest.mark.parametrize(
    ("perf", "speed", "word"),
    [
        ((0.02, 0.004), (0.1, 0.01), "HOLDS"),
        ((0.02, 0.004), (0.01, 0.01), "UNDECIDED"),
        ((-0.02, 0.004), (0.01, 0.01), "MISSES"),  # the one is known, whatever becomes of the other
        ((0.0, 0.0), (0.1, 0.01), "HOLDS"),  # exactly at the bound
    ],
)
def test_the_verdict_on_bounds_is_the_worst_of_them(perf, speed, word):
    bounds, values = (Bound("perf_norm", 0.97), Bound("speed_norm", -0.05)), (perf, speed)
    exact = [confirmed.verdict(Estimate(*value, math.inf), 0.0, confirmed.BOUND_WORDS, timed=0.0) for value in values]
    found, says = goal_text.verdict_on_bounds(list(zip(bounds, exact, strict=True)))
    assert found == word
    first, second = says.split("; SpeedNorm >= -0.05 ")
    assert first.startswith(f"PerfNorm >= 0.97 {exact[0].word}: ")
    assert second.startswith(exact[1].word)


def test_what_is_shown_names_the_quantity_and_its_bound():
    plan = known(perf=0.974, perf_se=0.003, speed=0.1, speed_se=0.02, size=0.62)
    assert goal_text.of_known(SMALL, plan) == "size 0.620 of the base model's, PerfNorm 0.974 ± 0.003 (>= 0.97)"
    assert goal_text.of_known(FAST, plan) == (
        "time per token 0.900 ± 0.020 of the base model's, PerfNorm 0.974 ± 0.003 (misses >= 0.99)"
    )
    assert goal_text.of_known(GOOD, plan) == "PerfNorm 0.974 ± 0.003, SpeedNorm 0.100 ± 0.020 (misses >= 0.4)"
    assert goal_text.of_known(BOTH, plan) == "Score 0.5370 ± 0.0101, PerfNorm 0.974 ± 0.003 (>= 0.9)"
    assert [str(goal) for goal in (Goal(), SMALL, FAST, GOOD)] == [
        "maximize score",
        "minimize size, perf_norm >= 0.97",
        "minimize time_per_token, perf_norm >= 0.99",
        "maximize perf_norm, speed_norm >= 0.4",
    ]


# -- the study file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "goal"),
    [
        ([], Goal()),
        (["goal={}"], Goal()),
        (["goal={maximize: score}"], Goal()),
        (['goal={minimize: size, perf_norm: ">= 0.97"}'], SMALL),
        (["goal={minimize: size, perf_norm: >=0.97}"], SMALL),
        (["goal.minimize=size", "goal.perf_norm=>= 0.97"], SMALL),
        (['goal={maximize: perf_norm, speed_norm: ">= 0.4"}'], GOOD),
        (['goal={maximize: score, perf_norm: ">= .9"}'], BOTH),
        (["goal={maximize: speed_norm}"], Goal("speed_norm")),
        (['goal={maximize: speed_norm, perf_norm: ">= 0.9"}', "goal={minimize: size}"], Goal("size")),  # the last one
    ],
)
def test_a_goal_is_read(words, goal):
    assert Goal.of(compose.load("demo", words).goal) == goal


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{maximize: perf_norm, minimize: size}", "names both maximize: perf_norm and minimize: size"),
        ("{minimize: score}", "score is better when it is larger; write maximize: score"),
        ("{minimize: speed_norm}", "write maximize: speed_norm"),
        ("{maximize: size}", "size is better when it is smaller; write minimize: size"),
        ("{maximize: perplexity}", "goal.maximize: is not one of score, perf_norm, speed_norm"),
        ("{minimize: sizes}", "did you mean 'size'"),
        ("{minimise: size}", "goal.minimise: unknown key; did you mean 'minimize'"),
        ('{minimize: size, perf_norm: "> 0.97"}', 'goal.perf_norm: is no bound; write it as ">= 0.97"'),
        ('{minimize: size, perf_norm: "97%"}', "goal.perf_norm: is no bound"),
        ('{minimize: size, perf_norm: "<= 0.97"}', "goal.perf_norm: is no bound"),
        ("{minimize: size, perf_norm: 0.97}", "goal.perf_norm: is no bound"),
        ('{minimize: size, perf_norm: ">= 97"}', "at most 2; the base model's PerfNorm is 1"),
        ('{maximize: perf_norm, speed_norm: ">= 1"}', "goal.speed_norm: must be below 1"),
        ('{maximize: perf_norm, perf_norm: ">= 0.9"}', "perf_norm can't be bounded"),
        ('{minimize: time_per_token, speed_norm: ">= 0.4"}', "speed_norm can't be bounded, since time_per_token is"),
        ('{maximize: perf_norm, size: "<= 500 MB"}', "size takes no bound here: a largest size is limits.max_size_mb"),
        ('{maximize: perf_norm, time_per_token: "<= 2 ms"}', "bound the time by speed_norm"),
        ("size", "goal: must hold keys"),
        ("null", "goal: must hold keys"),
    ],
)
def test_a_goal_that_makes_no_sense_is_refused_in_one_line(value, said):
    with pytest.raises(ConfigError) as caught:
        compose.load("demo", [f"goal={value}"])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_goal_ends_with_status_2_and_writes_nothing(refused, tmp_path):
    line = refused("run", "--study", "demo", 'goal={minimize: size, perf_norm: "97%"}', cwd=tmp_path)
    assert "(found '97%')" in line
    line = refused("run", "--study", "demo", "goal={minimize: size}", "pruner.name=median", cwd=tmp_path)
    assert "choose wilcoxon or none" in line


def test_the_default_goal_is_left_out_of_a_definition_so_that_older_studies_resume(tmp_path):
    default, small = (compose.load("demo", words) for words in ([], ["goal={minimize: size}"]))
    assert "goal" not in of_file(default)
    assert of_file(small)["goal"] == "minimize size"
    assert Goal.stored({"trials": 3}) == Goal()
    assert Goal.stored(small.stored()) == Goal("size")
    opened = study_storage.open_storage(f"sqlite:///{tmp_path}/studies.db")
    study_storage.create_or_resume(opened, "older", of_file(default))
    study_storage.create_or_resume(opened, "older", of_file(default))
    with pytest.raises(StudyMismatch, match='goal is "maximize score" there and "minimize size" here'):
        study_storage.create_or_resume(opened, "older", of_file(small))


# -- the best trial --------------------------------------------------------------------------------------------


def measured(value, **missed):
    attributes = {f"constraints:{name}": by for name, by in missed.items()}
    return create_trial(state=TrialState.COMPLETE, value=value, system_attrs=attributes)


def study_of(*trials):
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    return study


def test_the_best_trial_is_the_best_feasible_one_and_the_closest_misses_by_the_least():
    study = study_of(
        measured(0.9, perf_norm=0.1), measured(0.3, perf_norm=-0.1), measured(0.5, perf_norm=0.0), measured(0.5)
    )
    assert best.best_trial(study).number == 2 == study.best_trial.number
    assert [trial.number for trial in best.ranked(study.trials)] == [2, 3, 1]
    assert [trial.number for trial in best.by_nearness(study.trials)] == [2, 3, 1, 0]
    none = study_of(measured(0.9, perf_norm=0.1), measured(0.3, perf_norm=0.02, speed_norm=0.03), measured(0.2, a=0.1))
    assert best.best_trial(none) is None
    assert best.closest_of(none.trials).number == 1
    assert best.closest_of([]) is None


def test_a_trial_that_holds_its_bound_by_luck_rules_no_other_out():
    """Of two that reach it, the smaller by a tenth of its error: what lies between them is still looked at."""
    lucky, safe = measured(0.6, perf_norm=-0.001), measured(0.3, perf_norm=-0.02)
    for trial, error in ((lucky, 0.01), (safe, 0.01)):
        trial.set_user_attr("perf_norm_se", error)
    study = study_of(safe, lucky)
    assert best.best_trial(study).number == 1
    assert best.to_beat(study).number == 0
    assert best.to_beat(study_of(lucky)) is None
    free = study_of(measured(0.3), measured(0.6))
    assert best.to_beat(free).number == best.best_trial(free).number == 1


@pytest.mark.parametrize(("error", "ends"), [(0.01, False), (0.0005, True)])
def test_the_pruner_compares_with_a_trial_that_holds_its_bound_by_its_error(home, error, ends):
    """A trial with the better PerfNorm may miss its bound when it is confirmed; the plan may be what is left then."""
    made = forecast_of(home, 'goal={maximize: perf_norm, speed_norm: ">= 0.4"}')
    setting = made.setting
    shards = len(setting.texts.shards)
    study = optuna.create_study(direction="maximize")
    study.pruner = rungs.ShardsAlone(samplers.pruner(setting.file.pruner, shards), shards)
    other, trial = study.ask(), study.ask()
    values = [[value + 0.001 * (index % 3) for index in range(shards)] for value in (0.98, 0.9)]
    for step, value in enumerate(values[0], start=1):
        other.report(value, step)
    constraints.of_goal(other, setting.goal, known(perf=0.98, speed=0.401, speed_se=error))
    other.set_user_attr("speed_norm_se", error)
    study.tell(other, 0.98)
    screening = Screening(setting, None, made, print, print)
    plan = dataclasses.replace(setting.model.identity, num_hidden_layers=3)
    losses = [-math.log(value) for value in values[1]]
    why = None
    for step, value in enumerate(values[1], start=1):
        trial.report(value, step)
        why = why or screening._why_end(trial, plan, values[1][:step], losses[:step])
    assert (why is not None) == ends


def test_a_plan_that_misses_on_all_of_its_text_is_not_measured():
    """Half an error below the bound it might reach it on other text; on the same it can't."""
    known = Known(Score(0.95, 0.02, 0.0, 0.0, 0.475, 0.01), 0.5)
    bounded = Goal("size", (Bound("perf_norm", 0.97),))
    assert chance.misses(bounded, known) is None
    assert chance.misses_as_screened(bounded, known) == "PerfNorm 0.950 ± 0.020 stays below the goal's 0.97"
    assert chance.misses_as_screened(Goal("size", (Bound("perf_norm", 0.955),)), known) is None  # kernels may decide
    assert chance.misses_as_screened(Goal("size", (Bound("speed_norm", 0.5),)), known) is None


def test_patience_counts_from_the_best_feasible_trial():
    done = study_of(measured(0.2, perf_norm=-0.1), measured(0.9, perf_norm=0.3), measured(0.1, perf_norm=-0.2)).trials
    assert ending.out_of_patience(done, 3, SMALL) is None
    assert ending.out_of_patience(done, 2, SMALL).startswith(
        "limits.patience: 2 trials since trial 0 brought none that does better than its size 0.800 of the base model's"
    )


def test_a_reason_has_the_numbers_that_decide():
    leader = study_of(measured(0.4)).trials[0]
    assert chance.why_none(SMALL, known(perf=0.99, size=0.5), leader) is None
    assert chance.why_none(SMALL, known(perf=0.99, size=0.7), leader) == (
        "size 0.700 of the base model's is not below trial 0's 0.600"
    )
    assert chance.why_none(FAST, known(speed=0.3, speed_se=0.01), leader) == (
        "time per token 0.700 ± 0.010 of the base model's can't reach trial 0's 0.600"
    )
    assert chance.why_none(SMALL, known(perf=0.9, perf_se=0.01, size=0.5), None) == (
        "PerfNorm 0.900 ± 0.010 stays below the goal's 0.97"
    )
    assert chance.why_none(Goal(), known(perf=0.5), leader).startswith("Score 0.250 ± 0.000 (PerfNorm 0.500, SpeedNorm")


def test_a_trial_that_is_repeated_forgets_how_far_it_was_from_the_bounds(tmp_path):
    opened = study_storage.open_storage(f"sqlite:///{tmp_path}/studies.db")
    study = study_storage.create_or_resume(opened, "s", {"a": 1})
    trial = study.ask({"x": IntDistribution(1, 3)})
    trial.set_user_attr("plan", trial.params)
    constraints.of_plan(trial, None)
    constraints.of_goal(trial, SMALL, known(perf=0.9))
    assert trial.constraints["perf_norm"] == pytest.approx(0.07)
    assert trial.storage.get_trial_system_attrs(trial._trial_id)["constraints"] == [0.0, pytest.approx(0.07)]
    study.tell(trial, state=TrialState.FAIL)
    study_trials.requeue(study)
    assert study.trials[1].state == TrialState.WAITING
    assert study.trials[1].constraints == {}
    again = study.ask()
    constraints.of_plan(again, None)
    constraints.of_goal(again, SMALL, known(perf=0.99))
    study.tell(again, 0.3)
    assert study.best_trial.number == 1


# -- real studies ----------------------------------------------------------------------------------------------

STUDY = """
defaults: [_base, _self_]
study_name: goals
trials: 9
model: {{source: {model}}}
space:
  num_hidden_layers: {{low: 3, high: 5}}
  intermediate_size: {{low: 80, high: 160, step: 40}}
  precision: [bfloat16, W8A8]
text: {{window: 32, shards: 8, calibration_windows: 4, report: null}}
evaluation: {{backend: transformers, device: cpu, speed: predicted}}
sampler: {{name: random}}
tracking: {{mlflow: false}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, pico_llama):
    """One directory for all: a plan that one study has measured is not measured again by the next."""
    home = tmp_path_factory.mktemp("goals")
    (home / "studies").mkdir()
    (home / "studies" / "goals.yaml").write_text(STUDY.format(model=pico_llama))
    return home


def trials_of(home, name):
    return study_storage.load(study_storage.open_storage(f"sqlite:///{home}/outputs/studies.db"), name).trials


SIZE_GOAL = 'goal={minimize: size, perf_norm: ">= 0.92"}'
GOALS = {
    "size": (SIZE_GOAL, lambda attrs, base: 1 - attrs["model_size_mb"] / base, "perf_norm", 0.92),
    "time": ('goal={minimize: time_per_token, perf_norm: ">= 0.92"}', lambda a, _: a["speed_norm"], "perf_norm", 0.92),
    "perf": ('goal={maximize: perf_norm, speed_norm: ">= 0.3"}', lambda a, _: a["perf_norm"], "speed_norm", 0.3),
    "score": ('goal={maximize: score, perf_norm: ">= 0.92"}', lambda a, _: (a["perf_norm"] + a["speed_norm"]) / 2,
              "perf_norm", 0.92),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", GOALS)
def test_the_exported_trial_is_the_feasible_one_with_the_best_value_although_another_has_a_better_one(home, cli, name):
    word, value_of, bounded, least = GOALS[name]
    words = ("--study", "goals", "--study-name", name)
    ran = cli("run", *words, word, "--json", "pruner.name=none", cwd=home)
    assert ran.status == 0, ran.err
    trials = trials_of(home, name)
    base_mb = trials[0].user_attrs["model_size_mb"]
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    for trial in done:
        assert trial.value == pytest.approx(value_of(trial.user_attrs, base_mb))
        assert trial.constraints[bounded] == pytest.approx(least - trial.user_attrs[bounded])
    feasible = [trial for trial in done if trial.user_attrs[bounded] >= least]
    leader = max(feasible, key=lambda trial: trial.value)
    assert max(trial.value for trial in done) > leader.value  # it would be a wrong choice
    assert len(feasible) < len(done)

    state = ran.json
    assert state["best"]["trial"] == leader.number
    assert state["goal"] == str(Goal.of(compose.load("goals", [word], config_dir=home / "studies").goal))
    for row in state["pareto"]:
        trial = trials[row["trial"]]
        assert row["feasible"] == (trial in feasible)
        assert row["constraints"] == {bounded: pytest.approx(least - trial.user_attrs[bounded])}
        assert row["score"] == pytest.approx((row["perf_norm"] + row["speed_norm"]) / 2)
    exported = cli("export", *words, "--to", f"submit/{name}", cwd=home)
    assert exported.status == 0, exported.err
    line = exported.out.splitlines()[0]
    assert line.startswith(f"trial {leader.number}, {state['best']['result']}, perplexity")
    assert f"(>= {least:g})" in line
    evaluated = json.loads((home / "submit" / name / "eval_result.json").read_text())
    assert evaluated["trial"] == leader.number
    report = cli("report", "-e", name, "-m", f"submit/{name}", "--print-only", cwd=home)
    assert f"The goal is to {state['goal']}. The model has {state['best']['result']}." in report.out
    shown = cli("status", *words, cwd=home).out
    assert f"goal: {state['goal']}" in shown
    assert f"best: trial {leader.number}, {state['best']['result']}" in shown


@pytest.mark.long
def test_a_study_prunes_by_size_at_once_and_by_its_bound_on_the_screen_with_numbers(home, cli):
    words = ("run", "--study", "goals", "--study-name", "pruned", SIZE_GOAL, "--trials", "14", "--json")
    ran = cli(*words, cwd=home)
    assert ran.status == 0, ran.err
    assert "the base model itself" in ran.err
    trials = trials_of(home, "pruned")
    why = {trial.number: trial.user_attrs["reason"] for trial in trials if trial.state == TrialState.PRUNED}
    assert trials[0].value == 0.0
    sizes, screened = (
        [number for number, reason in why.items() if reason.startswith(rung)] for rung in ("forecast", "screen")
    )
    assert sizes
    assert screened
    assert set(sizes) | set(screened) == set(why)
    for number in sizes:
        holds = [
            each
            for each in trials[:number]
            if each.state == TrialState.COMPLETE
            and each.constraints["perf_norm"] + each.user_attrs["perf_norm_se"] <= 0  # luck rules nothing out
        ]
        leader = max(holds, key=lambda each: each.value)
        assert why[number].endswith(f"is not below trial {leader.number}'s {1 - leader.value:.3f}")
        assert trials[number].value <= leader.value + 1e-4
        assert trials[number].user_attrs["seconds"].keys() <= {"plan", "forecast"}  # nothing was built or scored
    for number in screened:
        attrs = trials[number].user_attrs
        perf_norm = math.exp(-attrs["loss"])
        assert why[number].startswith(f"screen: PerfNorm {perf_norm:.3f} ± ")
        assert "stays below the goal's 0.92 (" in why[number]
        assert trials[number].constraints["perf_norm"] == pytest.approx(0.92 - perf_norm)

    resumed = cli(*words[:-2], "15", "--json", cwd=home)
    assert resumed.status == 0, resumed.err
    assert [trial.values for trial in trials_of(home, "pruned")[:14]] == [trial.values for trial in trials]


@pytest.mark.long
def test_trials_are_timed_briefly_where_times_decide_nothing_and_at_length_for_a_score(home, cli):
    steps, turns = 4, 4 * speed.ROUND  # all are taken again, twice at most, where the base model seems slow
    timed = (
        f"evaluation.workload={{turns: {turns}, decode_steps: {steps}, prompt_tokens: 4}}",
        "evaluation.speed=measured",
    )
    of_plan = ("space.num_hidden_layers=4", "space.intermediate_size=null", "space.precision=null", "trials=1")
    words = ("--study", "goals", *timed, *of_plan, "pruner.name=none", "evaluation.score_se=1e-9")

    def samples(name, goal=()):
        ran = cli("run", *words, "--study-name", name, *goal, cwd=home)
        assert ran.status == 0, ran.err
        (trial,) = trials_of(home, name)
        kept = json.loads((home / "outputs" / "measurements" / f"{trial.user_attrs['measurement']}.json").read_text())
        return kept["timing_samples"]

    assert samples("brief", [SIZE_GOAL]) <= 3 * speed.ROUND * steps
    thorough = samples("thorough")
    assert thorough >= turns * steps  # the brief one is not taken for its own
    assert samples("small", ['goal={minimize: size, perf_norm: ">= 0.5"}']) == thorough  # what is there serves


@pytest.mark.long
def test_another_goal_is_refused_for_a_study_that_has_one(home, cli):
    words = ("--study", "goals", "--study-name", "kept")
    assert cli("run", *words, SIZE_GOAL, "--trials", "1", cwd=home).status == 0
    for word, said in (
        ('goal={minimize: size, perf_norm: ">= 0.9"}', '"minimize size, perf_norm >= 0.9" here'),
        ("goal={maximize: score}", '"maximize score" here'),
    ):
        ended = cli("run", *words, word, "--trials", "1", cwd=home)
        assert ended.status == 2
        (line,) = [line for line in ended.err.splitlines() if line.startswith("optuna-search: ")]
        assert f'goal is "minimize size, perf_norm >= 0.92" there and {said}' in line


@pytest.mark.long
def test_where_no_trial_reaches_the_goal_the_closest_is_named(home, cli):
    words = ("--study", "goals", "--study-name", "none")
    goal = 'goal={maximize: perf_norm, speed_norm: ">= 0.95"}'
    ran = cli("run", *words, goal, "--trials", "4", "pruner.name=none", cwd=home)
    assert ran.status == 0, ran.err
    closest = max(trials_of(home, "none"), key=lambda trial: trial.user_attrs["speed_norm"])
    told = f"trial {closest.number}: PerfNorm {closest.value:.3f}"
    assert f"no measured trial reaches the goal (maximize perf_norm, speed_norm >= 0.95); the closest is {told}" in (
        " ".join(ran.out.split())
    )
    state = cli("status", *words, "--json", cwd=home).json
    assert state["best"] is None
    assert state["closest"]["trial"] == closest.number
    study = study_storage.load(study_storage.open_storage(f"sqlite:///{home}/outputs/studies.db"), "none")
    assert status.of(study).stands_out == ""  # in a plot: the best Score misses the goal
    exported = cli("export", *words, cwd=home)
    assert exported.status == 2
    assert exported.out == ""
    assert told in exported.err
    assert f"--trial {closest.number}" in exported.err
    assert cli("export", *words, "--trial", closest.number, cwd=home).status == 0
    confirmed = cli("confirm", *words, cwd=home)
    assert confirmed.status == 2
    assert "no trial that reaches its goal (maximize perf_norm, speed_norm >= 0.95); the closest is" in confirmed.err
    assert told in confirmed.err


# -- the sampler -----------------------------------------------------------------------------------------------


def loss(nll):
    return Loss(nll, 0.001, abs(nll))


def forecast_of(home, word):
    """A forecast where depth costs much quality and saves much, and W8A8 costs little."""
    prepared = settings.prepare(compose.load("goals", [word, "evaluation.speed=measured"], home / "studies"))
    own = prepared.model.identity

    def cut(**changes):
        return dataclasses.replace(own, **changes)

    damage = DamageTable(
        own,
        (
            Entry(cut(num_hidden_layers=4), loss(0.30)),
            Entry(cut(num_hidden_layers=3), loss(0.60)),
            Entry(cut(intermediate_size=120), loss(0.02)),
            Entry(cut(intermediate_size=80), loss(0.05)),
            Entry(cut(precision="W8A8"), loss(0.01)),
        ),
    )
    shapes = {0.6: cut(num_hidden_layers=3), 0.85: cut(intermediate_size=80), 0.9: cut(precision="W8A8")}
    probes = tuple(
        Probe(speed_table.shape_of(prepared, plan), {1: ratio}, {1: 0.002}) for ratio, plan in shapes.items()
    )
    return Forecast(prepared, SpeedTable(speed_table.shape_of(prepared, own), {1: 2.0}, probes), damage)


def proposed(made, count):
    """Return the plans that the sampler proposes if they turn out as forecast, the base model first."""
    setting = made.setting
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial(space.uncut(setting.file.space, setting.model.identity)[0])
    plans = []
    for number in range(count + 1):
        study.sampler = ForecastSampler(made, seed=number)
        trial = study.ask()
        plan = space.suggest(trial, setting.file.space, setting.model.identity)
        if NOTHING_LEFT in study.trials[-1].system_attrs:
            break
        expected = Known(made.expected(plan), setting.size_ratio(plan))
        for name in ("perf_norm", "speed_norm"):
            trial.set_user_attr(name, getattr(expected.score, name))
        constraints.of_goal(trial, setting.goal, expected)
        study.tell(trial, setting.goal.value(expected))
        plans.append(expected)
    return plans[1:], study


@pytest.mark.parametrize("what", ["size", "time_per_token"])
def test_the_sampler_prefers_plans_that_reach_the_bound(home, what):
    made = forecast_of(home, f'goal={{minimize: {what}, perf_norm: ">= 0.9"}}')
    plans, study = proposed(made, 8)
    goal = made.setting.goal
    assert goal.reaches(plans[0])
    assert all(goal.broken(plan) is None for plan in plans)  # the smallest and fastest ones lose far more
    every = [
        Known(made.expected(plan), made.setting.size_ratio(plan)) for plan in ForecastSampler(made, 0).best_plans(99)
    ]
    feasible = [goal.value(plan) for plan in every if goal.reaches(plan)]
    assert best.best_trial(study).value == pytest.approx(max(feasible), abs=0.01)
    assert max(goal.value(plan) for plan in every) > max(feasible) + 0.1


@pytest.mark.parametrize("goal", ["{minimize: size, perf_norm: '>= 0.9'}", "{maximize: perf_norm}"])
def test_a_trial_that_ended_after_its_cheap_screen_teaches_what_was_expected_of_it(home, goal):
    made = forecast_of(home, f"goal={goal}")
    setting, study = made.setting, optuna.create_study(direction="maximize")
    expected = Known(Score(0.8, 0.01, 0.1, 0.01, 0.45, 0.007), 0.9)
    for looked_at in (False, True):
        trial = study.ask()
        space.suggest(trial, setting.file.space, setting.model.identity)
        constraints.of_goal(trial, setting.goal, expected)
        trial.report(setting.goal.value(expected), rungs.FORECAST)
        if looked_at:  # else the forecast alone ended it, which teaches the forecast nothing
            trial.report(setting.goal.value(expected), rungs.cheap(len(setting.texts.shards)))
            trial.set_user_attr("cheap_loss", 0.4)
        study.tell(trial, state=TrialState.PRUNED)
    searched = space.distributions(setting.file.space, setting.model.identity)
    (seen,) = ForecastSampler(made, 0).observations(study.trials[::-1], searched, "perf_norm")
    assert seen.value == pytest.approx(0.8)
    assert seen.params == study.trials[1].params


def test_the_best_plans_of_a_forecast_reach_the_bounds_first(home):
    made = forecast_of(home, 'goal={minimize: size, perf_norm: ">= 0.9"}')
    goal = made.setting.goal
    shown = [
        Known(made.expected(plan), made.setting.size_ratio(plan)) for plan in ForecastSampler(made, 1).best_plans(18)
    ]
    reached = [goal.reaches(plan) for plan in shown]
    assert reached == sorted(reached, reverse=True)
    assert {True, False} == set(reached)
    values = [goal.value(plan) for plan in shown if goal.reaches(plan)]
    assert values == sorted(values, reverse=True)


def test_a_section_without_keys_maximizes_the_score():
    assert GoalSection().maximize == "score"
    assert GoalSection.model_validate({"maximize": None, "minimize": None}) == GoalSection()
