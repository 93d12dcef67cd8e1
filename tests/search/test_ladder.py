"""The ladder of a trial on a real study: each rung is reported, computed once, resumable, and ends what it can."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from compressors.methods.quantizers import gptq
from compressors.plan import canonical
from search.config import compose
from search.errors import ConfigError
from search.setup import setting as settings
from search.setup.goal import Goal
from search.stages import damage_table
from search.stages.bench import Bench
from search.stages.cheap_screen import Gain, cut_alone
from search.study import ending, rungs
from search.study import trials as study_trials
from search.study.forecast_sampler import WAITS
from search.study.ladder import ladder

SHARDS = 6
STUDY = """
defaults: [_base, _self_]
study_name: ladder
trials: 14
storage: sqlite:///{home}/studies.db
outputs: {home}/outputs
model: {{source: {model}}}
space:
  num_hidden_layers: {{low: 3, high: 5}}
  intermediate_size: {{low: 80, high: 160, step: 8}}
  importance: [energy]
  repair: [stream]
  precision: [bfloat16, W8A8]
text: {{calibration: embedded, window: 32, shards: 6, calibration_windows: 4, moments_windows: 4, report: null}}
evaluation: {{backend: transformers, device: cpu, speed: predicted, forecast: true}}
sampler: {{name: random}}
tracking: {{mlflow: false}}
"""


@pytest.fixture
def home(tmp_path, pico_llama):
    (tmp_path / "ladder.yaml").write_text(STUDY.format(home=tmp_path, model=pico_llama))
    return tmp_path


def run(cli, home, *words):
    ended = cli("run", "--study", "ladder", "--config-dir", home, "--json", *words, cwd=home)
    assert ended.status == 0, ended.err
    return ended


def trials_of(home):
    return optuna.load_study(study_name="ladder", storage=f"sqlite:///{home}/studies.db").trials


@pytest.mark.long
def test_every_rung_is_reported_and_a_pruned_trial_has_the_value_of_its_last_one(home, cli):
    ended = run(cli, home)
    trials = trials_of(home)
    rung_of = {"forecast": rungs.FORECAST, "cheap screen": rungs.cheap(SHARDS), "screen": rungs.screened(SHARDS)}
    searched = [trial for trial in trials if not study_trials.is_base_model(trial)]
    for trial in searched:
        values = trial.intermediate_values
        assert values[rungs.FORECAST] == trial.user_attrs["forecast_score"]
        shards = rungs.of_shards(values, SHARDS)
        assert list(shards) == list(range(1, len(shards) + 1))
        if shards:
            assert values[rungs.screened(SHARDS)] == pytest.approx(sum(shards.values()) / len(shards))
        if trial.state == TrialState.COMPLETE:
            assert values[rungs.measured(SHARDS)] == trial.value
            assert len(shards) == SHARDS
        else:
            rung = trial.user_attrs["reason"].split(":")[0]
            assert max(values) == rung_of[rung]
            assert trial.value == values[rung_of[rung]]
            assert trial.user_attrs["seconds"].keys() >= {rung}
    assert {trial.state for trial in searched} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert any("cheap_loss" in trial.user_attrs for trial in searched)
    assert ended.json["finished"] == 14


KILLED = """
    import os, signal
    from search import cli
    from search.stages import screen
    from search.stages.bench import Bench
    from search.study import objective

    def killed(method, when):
        calls = []
        def wrapped(*args, **kwargs):
            if when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(method(*args, **kwargs))
            os.kill(os.getpid(), signal.SIGKILL)
        return wrapped

    rung = os.environ["KILL_AT"]
    if rung == "forecast":
        objective.Objective._require_chance = killed(objective.Objective._require_chance, "before")
    elif rung == "cheap screen":
        objective.cheap_screen.Gain.loss = killed(objective.cheap_screen.Gain.loss, "before")
    elif rung == "screen":
        objective.Screening.report_mean = killed(objective.Screening.report_mean, "before")
    elif rung == "build":
        Bench.build = killed(Bench.build, "after")
    elif rung == "measure":
        Bench.measure = killed(Bench.measure, "after")
    cli.main()
"""


slow = pytest.mark.slow


@pytest.mark.long
@pytest.mark.parametrize(  # test_resume kills within the other stages
    "rung", ["cheap screen", *(pytest.param(name, marks=slow) for name in ("forecast", "screen", "build", "measure"))]
)
def test_a_study_killed_at_a_rung_goes_on_there_and_computes_nothing_twice(home, cli, rung):
    words = ("run", "--study", "ladder", "--config-dir", str(home), "--trials", "6", "--json")
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), *words],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "KILL_AT": rung},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = [path for name in ("screens", "checkpoints", "forecast") for path in (home / "outputs" / name).glob("*")]
    assert any(path.name.startswith("damage-") for path in kept)
    before = {path: path.stat().st_mtime_ns for path in kept if not path.name.startswith(".")}
    half_done = [trial for trial in trials_of(home) if trial.state == TrialState.RUNNING]
    assert len(half_done) == 1
    run(cli, home, "--trials", "6")
    still = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    assert still == {path: before[path] for path in still}
    assert {path.parent.name for path in before.keys() - still.keys()} <= {"checkpoints"}  # of plans that are not best
    trials = trials_of(home)
    assert len(study_trials.finished(trials)) == 6
    again = [trial for trial in trials if half_done[0].number in trial.system_attrs.get("retry_history", [])]
    assert [trial.params for trial in again] == [half_done[0].params]


@pytest.mark.slow
def test_a_study_ends_when_the_forecast_says_that_nothing_is_left_to_win(home, cli):
    ended = run(cli, home, "--trials", "300", "sampler.name=forecast")
    trials = trials_of(home)
    assert len(trials) < 40
    assert sum(trial.user_attrs.get("reason", "").startswith("forecast:") for trial in trials) <= 2  # not proposed
    assert "the study ends here: no plan is left that could beat the best trial" in ended.err
    best = max(trial.value for trial in trials_of(home) if trial.state == TrialState.COMPLETE)
    again = run(cli, home, "--trials", "300", "sampler.name=forecast")
    assert again.json["finished"] == ended.json["finished"] + 1  # it is asked again
    run(cli, home, "--trials", str(ended.json["finished"] + 13), "sampler.name=random")
    assert max(trial.value for trial in trials_of(home) if trial.state == TrialState.COMPLETE) <= best + 0.01


@pytest.mark.slow
def test_a_study_ends_in_time_and_without_patience(home, cli):
    first = run(cli, home, "--time", "1s", "evaluation.forecast=false")
    assert first.json["finished"] < 5  # the start took most of the time
    assert "the study ends here: limits.time" in first.err
    second = run(cli, home, "limits.patience=2", "evaluation.forecast=false", "--trials", "40")
    assert 3 <= second.json["finished"] < 40
    assert "limits.patience: 2 trials since trial " in second.err
    bad = cli("run", "--study", "ladder", "--config-dir", home, "--time", "soon", cwd=home)
    assert bad.status == 2
    assert "limits.time" in bad.err
    assert "write it as 90, 45s, 30m, 2h or 1h30m" in bad.err


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("45s", 45), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1h 5m 2s", 3902)]
)
def test_a_length_of_time_is_written_as_people_do(home, text, seconds):
    assert compose.load("ladder", [f"limits.time={text}"], home).limits.time == seconds


@pytest.mark.parametrize("text", ["0", "-5", "2 days", "h", "''", "1.5h", "nan"])
def test_what_is_no_length_of_time_is_refused(home, text):
    with pytest.raises(ConfigError, match=r"limits\.time"):
        compose.load("ladder", [f"limits.time={text}"], home)


def finished(number, value, seconds=None):
    attributes = {} if seconds is None else {"seconds": {"screen": 1.0, "measure": seconds - 1.0}}
    trial = create_trial(value=value, user_attrs=attributes)
    trial.number = number
    return trial


def test_no_trial_is_begun_that_would_end_too_late():
    done = [finished(0, 0.5, 20.0), finished(1, 0.4, 40.0)]
    assert ending.out_of_time(done, float("inf")) is None
    assert ending.out_of_time(done, 31.0) is None
    assert "29 s are left, and a trial that is measured takes 30 s" in ending.out_of_time(done, 29.0)
    assert ending.out_of_time([], 5.0) is None
    assert ending.out_of_time([], -1.0) == "limits.time is up"


def test_pruners_see_the_shards_alone():
    seen = {}

    class Spy(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            seen.update(trial.intermediate_values)
            return trial.last_step == SHARDS

    study = optuna.create_study(pruner=rungs.ShardsAlone(Spy(), SHARDS))
    trial = study.ask()
    for step, value in enumerate([0.9, 0.1, 0.2, 0.3, 0.4, 0.5]):
        trial.report(value, step)
    trial.report(0.8, rungs.cheap(SHARDS))
    assert not trial.should_prune()
    assert seen == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5}
    trial.report(0.6, SHARDS)
    assert trial.should_prune()


def test_the_gain_of_a_repair_is_learnt_from_trials_that_had_both_screens():
    assert Gain.learnt(0.6, [(0.5, 0.2, 0.1)] * 2).share == 0.6  # too few
    right, nothing = [(0.8, 0.2, 0.16), (0.4, 0.4, 0.16), (0.3, 0.1, 0.04)], (0.5, 0.001, 5.0)  # too small a loss
    gain = Gain.learnt(0.5, [*right, nothing])
    assert gain.share == pytest.approx(0.5)
    halved = Gain.learnt(0.8, [(0.8, 0.2, 0.08), (0.4, 0.4, 0.08), (0.3, 0.1, 0.016)])
    assert halved.share == pytest.approx(0.4)
    assert gain.loss(0.3, 0.0)[0] == pytest.approx(0.15)
    assert gain.loss(0.3, 0.1)[1] > gain.loss(0.3, 0.0)[1] > 0
    assert gain.loss(-0.1, 0.0) == (0.0, 0.0)


def test_the_cheap_screen_is_of_the_cut_alone(home):
    prepared = settings.prepare(compose.load("ladder", config_dir=home))
    own = prepared.model.identity
    changed = {"intermediate_size": 120, "precision": "W8A8", "importance": "energy"}
    plan = own.from_dict({**own.to_dict(), **changed, "repair": "stream"})
    assert cut_alone(plan, own) == own.from_dict(
        {**own.to_dict(), **changed, "repair": "ridge", "precision": "bfloat16"}
    )
    assert cut_alone(own.from_dict({**plan.to_dict(), "repair": "ridge"}), own) is None
    only_quantized = own.from_dict({**own.to_dict(), "precision": "W8A8", "repair": "stream"})
    assert cut_alone(only_quantized, own) is None


def test_the_error_of_forecasts_shrinks_or_grows_with_what_trials_show():
    assert damage_table.relative_error([]) == damage_table.RELATIVE_ERROR
    good = damage_table.relative_error([(0.1, 0.101)] * 10)
    bad = damage_table.relative_error([(0.1, 0.2)] * 10)
    assert damage_table.LEAST_RELATIVE_ERROR <= good < 0.1
    assert 0.9 < bad < 1.0


def climbed(number, values, state, seconds):
    steps = {"forecast": 0, "cheap": rungs.cheap(2), "screen": rungs.screened(2), "measured": rungs.measured(2)}
    trial = create_trial(
        state=state,
        value=values.get("measured", 0.0) if state == TrialState.COMPLETE else None,
        intermediate_values={steps[name]: value for name, value in values.items()},
        user_attrs={"seconds": seconds},
    )
    trial.number = number
    return trial


def test_the_ladder_tells_what_each_rung_took_and_how_well_it_foretold_the_next():
    complete, pruned = TrialState.COMPLETE, TrialState.PRUNED
    trials = [
        climbed(
            0, {"forecast": 0.1, "screen": 0.1, "measured": 0.3}, complete, {"screen": 2, "build": 1, "measure": 5}
        ),
        climbed(
            1, {"forecast": 0.2, "screen": 0.2, "measured": 0.2}, complete, {"screen": 2, "build": 1, "measure": 5}
        ),
        climbed(
            2, {"forecast": 0.3, "screen": 0.3, "measured": 0.1}, complete, {"screen": 2, "build": 1, "measure": 1}
        ),
        climbed(3, {"forecast": 0.4}, pruned, {"forecast": 0.5}),
        climbed(4, {"forecast": 0.5, "screen": 0.4}, pruned, {"forecast": 0.5, "screen": 3}),
        climbed(5, {"forecast": 0.6}, TrialState.FAIL, {}),  # no rung decided that
    ]
    forecast, screen, measured = ladder(trials, 2, Goal())
    assert (forecast.name, forecast.trials, forecast.ended, forecast.kendall, forecast.both) == (
        "forecast",
        6,
        1,
        1.0,
        4,
    )
    assert (screen.trials, screen.ended, screen.kendall, screen.both) == (4, 1, -1.0, 3)
    assert (measured.name, measured.trials, measured.ended, measured.kendall) == ("measure", 3, 3, None)
    assert [rung.seconds for rung in (forecast, screen, measured)] == [1.0, 9.0, 14.0]
    assert sum(rung.share for rung in (forecast, screen, measured)) == pytest.approx(1.0)
    assert ladder([], 2, Goal()) == ()
    faster, smaller = (ladder(trials, 2, Goal(objective)) for objective in ("time_per_token", "size"))
    assert [rung.kendall for rung in faster] == [None, -1.0, None]  # the screen repeats the forecast time
    assert [rung.kendall for rung in smaller] == [None, None, None]  # a size is what it is from the first rung on


@pytest.mark.slow
def test_a_plan_waits_while_another_promises_more_and_the_reason_names_it(home, cli):
    run(cli, home, "sampler.name=forecast", "--trials", "6")
    waiting = [trial for trial in trials_of(home) if WAITS in trial.system_attrs]
    assert waiting
    for trial in waiting:
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs["reason"].startswith("cheap screen: it is expected to gain")
        assert max(trial.intermediate_values) == rungs.cheap(SHARDS)
        assert "screen" not in trial.user_attrs["seconds"]
    assert any(trial.state == TrialState.COMPLETE and "cheap_loss" in trial.user_attrs for trial in trials_of(home))


@pytest.mark.long
def test_a_build_takes_the_weights_that_the_screen_rounded(home, monkeypatch):
    def bench(outputs):
        words = [f"outputs={home}/{outputs}", "space.quantizer=[gptq]"]
        return Bench.of(settings.prepare(compose.load("ladder", words, home)))

    with bench("apart") as apart, bench("outputs") as screened:
        own = screened.setting.model.identity
        plan = canonical(dataclasses.replace(own, precision="W8A8", quantizer="gptq"), own)
        other = dataclasses.replace(plan, num_hidden_layers=4)
        _, expected = apart.build(plan, print)
        screened.screen(other, print)
        screened.screen(plan, print)
        monkeypatch.setattr(gptq, "round_weight", lambda *arguments: pytest.fail("rounded again"))
        _, found = screened.build(plan, print)
        assert found == expected
        with pytest.raises(pytest.fail.Exception):  # the last screen's plan alone is kept
            screened.build(other, print)
