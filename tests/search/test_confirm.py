"""Confirmation of a study's best trials: a real study of a pico model, real engine processes on the CPU."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from click.testing import CliRunner

from compressors.plan import CompressionPlan
from evaluator.backends import EngineSettings, vllm
from search import cli as commands
from search import confirm
from search.by_hand import export
from search.config import compose
from search.setup import keys, setting
from search.stages import confirm as stage
from search.stages import confirmed
from search.study import best as best_trials
from search.study import status, storage, workers
from tests.waiting import until

STUDY = """
defaults: [_base, _self_]
study_name: sure
trials: 4
model: {{source: {model}}}
space:
  num_hidden_layers: {{low: 2, high: 5}}
text: {{window: 32, calibration_windows: 4, shards: 4, windows_per_shard: 2}}
evaluation:
  backend: transformers
  device: cpu
  score_se: 0
  workload: {{prompt_tokens: 8, decode_steps: 4, turns: 4}}
pruner: {{name: none}}
confirm: {{top: 2, pairs: 2}}
tracking: {{mlflow: false}}
"""


def make(home, model):
    (home / "studies").mkdir(parents=True)
    (home / "studies" / "sure.yaml").write_text(STUDY.format(model=model))
    file = compose.load("sure", config_dir=home / "studies")
    return file.model_copy(update={"outputs": home / "outputs", "storage": f"sqlite:///{home}/outputs/studies.db"})


@pytest.fixture(scope="module")
def studied(tmp_path_factory, pico_llama):
    """A study of the base model and three plans with fewer layers, of which nothing is confirmed."""
    home = tmp_path_factory.mktemp("sure") / "home"
    file = make(home, pico_llama)
    study = storage.create_or_resume(
        storage.open_storage(file.storage), file.study_name, keys.definition(setting.prepare(file))
    )
    for layers in (5, 4, 3, 2):
        study.enqueue_trial({"num_hidden_layers": layers})
    workers.run_study(file)
    return home


@pytest.fixture
def home(studied, tmp_path, monkeypatch):
    path = Path(shutil.copytree(studied, tmp_path / "home"))
    monkeypatch.chdir(path)
    return path


@pytest.fixture(scope="module")
def done(studied, tmp_path_factory):
    """The study's home after `run` was called again, which had only its confirmation to do; and what that printed."""
    home = Path(shutil.copytree(studied, tmp_path_factory.mktemp("done") / "home"))
    with contextlib.chdir(home):
        ended = invoke("run", "--json")
    assert ended.exit_code == 0, ended.stderr
    return home, json.loads(ended.stdout)


def invoke(command, *words):
    return CliRunner().invoke(commands.main, [command, "--study", "sure", *words], catch_exceptions=False)


def study_in(home):
    return storage.load(storage.open_storage(f"sqlite:///{home}/outputs/studies.db"), "sure")


def pairs_in(home):
    """Return the kept pairs of each plan, by file."""
    files = [path for path in (home / "outputs" / "confirmed").glob("*.json") if not path.name.startswith("base-")]
    return {path.name: json.loads(path.read_text())["pairs"] for path in files}


def test_run_confirms_its_best_trials(done):
    home, state = done
    best = [trial.number for trial in best_trials.ranked(study_in(home).get_trials()) if trial.number][:2]
    rows = state["confirmed"]
    assert {row["trial"] for row in rows} == set(best)
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    for row in rows:
        assert row["text"] == "report text"
        assert 2 <= row["pairs"] <= row["taken"] <= 4  # a pair with a slow process is timed again, twice at most
        assert row["perf_norm"] == pytest.approx(row["base_perplexity"] / row["perplexity"])
        assert row["score"] == pytest.approx(max(0.5 * row["perf_norm"] + 0.5 * row["speed_norm"], 0))
        assert row["verdict"] in ("BETTER", "SAME", "WORSE", "UNDECIDED")
        assert row["score_half"] > 1.9 * row["score_se"]
        trial = study_in(home).trials[row["trial"]]
        assert row["perf_norm"] != trial.user_attrs["perf_norm"]  # another text
    assert sorted(len(pairs) for pairs in pairs_in(home).values()) == sorted(row["taken"] for row in rows)
    assert "### Confirmed" in study_in(home).user_attrs["note"]


def test_what_is_confirmed_is_not_measured_again(done, tmp_path, monkeypatch):
    home = Path(shutil.copytree(done[0], tmp_path / "home"))
    monkeypatch.chdir(home)
    before, known = pairs_in(home), [row.to_dict() for row in status.confirmed_of(study_in(home))]
    monkeypatch.setattr(stage, "EngineProcess", None)  # nothing may be started
    ended = invoke("confirm", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout) == json.loads(json.dumps(known))
    assert pairs_in(home) == before
    ended = invoke("confirm", "--top", "1")
    assert "Confirmed on the report text" in ended.stdout


@pytest.mark.long
def test_more_pairs_are_added_and_a_new_trial_is_confirmed_with_the_others(done, tmp_path, monkeypatch):
    home = Path(shutil.copytree(done[0], tmp_path / "home"))
    monkeypatch.chdir(home)
    before = pairs_in(home)
    ended = invoke("confirm", "--top", "3", "--pairs", "3", "--json")
    assert ended.exit_code == 0, ended.stderr
    after = pairs_in(home)
    assert len(after) == 3
    for name, pairs in after.items():
        assert len(pairs) >= 3
        assert pairs[: len(before.get(name, []))] == before.get(name, [])


def test_export_takes_the_best_confirmed_trial_and_carries_its_numbers(done, tmp_path, monkeypatch):
    home = Path(shutil.copytree(done[0], tmp_path / "home"))
    monkeypatch.chdir(home)
    study = study_in(home)
    rows = status.confirmed_of(study)
    turned = [dataclasses.replace(rows[0], score=0.6), dataclasses.replace(rows[1], score=0.7)]  # another order
    study.set_user_attr(status.CONFIRMED, [row.to_dict() for row in turned])
    ended = invoke("export")
    assert ended.exit_code == 0, ended.stderr
    assert f"trial {turned[1].trial}, the best of those that are confirmed" in ended.stdout
    assert f"trial {turned[1].trial} (Score 0.7000" in ended.stdout
    for name in ("eval_result.json", "compression.json"):
        found = json.loads((home / "submit" / "model" / name).read_text())["confirmed"]
        assert found == turned[1].to_dict()
    report = CliRunner().invoke(commands.main, ["report", "-e", "sure", "-m", "submit/model"], catch_exceptions=False)
    assert report.exit_code == 0, report.stderr
    (written,) = (home / "outputs").rglob("*_report.md")
    said = f"confirmed on the report text by {turned[1].pairs} fresh pairs of processes"  # 2 to 4, as they are noisy
    assert said in written.read_text()


def test_the_base_model_stays_the_best_where_no_confirmed_score_is_higher(done, tmp_path):
    home = Path(shutil.copytree(done[0], tmp_path / "home"))
    study = study_in(home)
    rows = [dataclasses.replace(row, score=0.4) for row in status.confirmed_of(study)]
    study.set_user_attr(status.CONFIRMED, [row.to_dict() for row in rows])
    trial, row = export.choose(study, None)
    assert (trial.number, row) == (0, None)
    assert export.choose(study, rows[0].trial)[1] == rows[0]


@pytest.mark.long
@pytest.mark.parametrize(("least", "confirmed_trials"), [(0.1, 1), (1.9, 3)])
def test_where_a_bound_is_missed_the_next_trials_are_confirmed_and_none_is_exported(home, least, confirmed_trials):
    study = study_in(home)
    goal = {"minimize": "size", "perf_norm": f">= {least}"}
    study.set_user_attr("file", {**study.user_attrs["file"], "goal": goal})
    ended = invoke("confirm", "--top", "1", "--pairs", "1")
    assert ended.exit_code == 0, ended.stderr
    rows, leader = status.confirmed_of(study), best_trials.ranked(study.get_trials())[0].number
    assert len(rows) == confirmed_trials
    word = "HOLDS" if confirmed_trials == 1 else "MISSES"
    for row in rows:
        assert row.bounds_verdict == word
        assert row.bounds_says.startswith(f"PerfNorm >= {least} {word}: ")
        assert float(row.bounds_says.split()[4].replace("−", "-")) == pytest.approx(row.perf_norm - least, abs=1e-4)
    said, shown = "no confirmed trial reaches the goal (minimize size, perf_norm >= 1.9)", invoke("status")
    for printed in (ended.stdout, shown.stdout):
        words = " ".join(printed.split())
        assert (said in words) == (confirmed_trials == 3)
        assert f"; {rows[0].bounds_says}" in words
        assert "verdicts on the goal's bounds" in words
        assert "no confirmed trial stands for the best" not in printed
    if confirmed_trials == 1:
        assert export.choose(study, None)[1] == rows[0]
        return
    refused = invoke("export")
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert f"export that one with --trial {leader}" in refused.stderr
    assert not (home / "submit").exists()
    assert export.choose(study, leader)[0].number == leader


def test_a_better_trial_that_is_not_confirmed_yet_makes_the_confirmation_old(done, tmp_path):
    home = Path(shutil.copytree(done[0], tmp_path / "home"))
    study = study_in(home)
    best = next(trial.number for trial in best_trials.ranked(study.get_trials()) if trial.number)
    assert status.confirmed_best(study) is not None
    rest = [row.to_dict() for row in status.confirmed_of(study) if row.trial != best]
    study.set_user_attr(status.CONFIRMED, rest)
    assert status.confirmed_best(study) is None
    assert export.choose(study, None)[0].number == study.best_trial.number


@pytest.mark.long
def test_a_kill_between_two_pairs_loses_only_the_pair_in_flight(home):
    words = [sys.executable, "-m", "search.cli", "confirm", "--study", "sure", "--top", "1", "--pairs", "30"]
    root = str(Path(commands.__file__).parents[2])
    running = subprocess.Popen(words, cwd=home, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.DEVNULL)
    assert until(lambda: running.poll() is not None or any(map(len, pairs_in(home).values())))
    assert running.poll() is None
    running.send_signal(signal.SIGKILL)
    running.wait()
    ((name, before),) = pairs_in(home).items()
    assert 1 <= len(before) < 30
    assert status.confirmed_of(study_in(home)) == []
    ended = invoke("confirm", "--top", "1", "--pairs", str(len(before) + 1), "--json")
    assert ended.exit_code == 0, ended.stderr
    after = pairs_in(home)[name]
    assert after[: len(before)] == before
    assert len(after) <= len(before) + 1 + confirmed.MOST_REPLACED
    (row,) = json.loads(ended.stdout)
    assert row["taken"] == len(after)


def test_a_deleted_checkpoint_is_built_again(home):
    shutil.rmtree(home / "outputs" / "checkpoints")
    ended = invoke("confirm", "--top", "1", "--pairs", "1", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)[0]["pairs"] >= 1


def test_a_model_that_can_not_be_served_fails_alone(home, monkeypatch):
    study = study_in(home)
    file = confirm.study_file(study, compose.load("sure", config_dir=home / "studies"))
    prepared = setting.prepare(file.model_copy(update={"outputs": home / "outputs"}))
    asked = confirmed.Asked.of(prepared)
    own = prepared.model.identity
    good = confirmed.Model("good", dataclasses.replace(own, num_hidden_layers=4))
    bad = confirmed.Model("bad", dataclasses.replace(own, num_attention_heads=5))  # for 3 key/value heads
    warned = []
    done, failed = stage.confirm(asked, [bad, good], 2, lambda text: None, warned.append)
    assert [result.model for result in done] == [good]
    assert [one.model for one in failed] == [bad]
    assert "5 query heads" in warned[0]
    assert "5 query heads" in failed[0].reason


@pytest.mark.long
def test_the_base_model_as_its_own_candidate_is_neither_better_nor_worse(home):
    study = study_in(home)
    file = confirm.study_file(study, compose.load("sure", config_dir=home / "studies"))
    prepared = setting.prepare(file.model_copy(update={"outputs": home / "outputs"}))
    asked = confirmed.Asked.of(prepared, home / "itself")
    itself = confirmed.Model("base model", prepared.model.identity)
    ((result,), failed) = stage.confirm(asked, [itself], 2, lambda text: None)
    assert not failed
    assert result.score.perf_norm == 1.0
    assert result.measurement.perplexity == result.baseline.perplexity


def test_nothing_measured_is_one_line(home):
    study = study_in(home)
    empty = optuna.create_study(study_name="empty", storage=study._storage, direction="maximize")
    empty.set_user_attr("file", study.user_attrs["file"])
    ended = invoke("confirm", "--study-name", "empty")
    assert ended.exit_code == 2
    assert "nothing to confirm; run it until another is complete" in ended.stderr.splitlines()[-1]


def test_an_unknown_argument_of_the_server_is_refused_before_anything_is_measured(home):
    for command in ("confirm", "run"):
        ended = invoke(command, "confirm.server={max_model_length: 4096}")
        assert ended.exit_code == 2
        assert "confirm.server" in ended.stderr.splitlines()[-1]
        assert "Traceback" not in ended.stderr
    assert not (home / "outputs" / "confirmed").exists()


SOURCE = '''
class Other:
    seed: int = 0


class EngineArgs:
    """Arguments for vLLM engine."""

    model: str = "x"
    max_model_len: int | None = None
    enable_prefix_caching: bool | None = None
    trust_remote_code: bool = False

    def method(self):
        local: int = 1
'''


def test_the_servers_arguments_are_read_from_its_source(tmp_path):
    (tmp_path / "arg_utils.py").write_text(SOURCE)
    assert vllm.arguments_of(tmp_path / "arg_utils.py") == {"max_model_len", "enable_prefix_caching"}
    assert vllm.arguments_of(tmp_path / "nothing.py") == frozenset()


def test_the_servers_settings_replace_ours_and_null_leaves_it_to_vllm():
    config = {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    server = {"max_model_len": 2048, "compilation_config": None, "enable_prefix_caching": True}
    own = vllm._arguments(config, EngineSettings(), on_cpu=False)
    found = vllm._arguments(config, EngineSettings(arguments=server), on_cpu=False)
    assert own["enable_prefix_caching"] is False
    assert found["enable_prefix_caching"] is True
    assert found["max_model_len"] == 2048
    assert "compilation_config" not in found
    assert own.keys() - found.keys() == {"compilation_config"}
    longest = vllm._arguments(config, EngineSettings(arguments={"max_model_len": None}), on_cpu=False)
    assert "max_model_len" not in longest


def test_plans_are_confirmed_once_each(home):
    chosen = confirm.choose(study_in(home), 10)
    plans = [CompressionPlan.from_dict(trial.user_attrs["plan"]) for trial in chosen]
    assert len(set(plans)) == len(plans) == 3
    assert all(trial.number for trial in chosen)  # not the base model
