"""Tests of tracking with MLflow itself: a store on disk, and a server that can't be reached."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from compressors.plan import CompressionPlan
from evaluator.measurement import OF_ANSWERS
from search import processes
from search.config.study_file import Tracking
from search.study import mlflow_runs
from search.study.mlflow_result import COUNTS
from search.study.mlflow_runs import METRICS, PARAMETERS, PARENT, TRIAL, Tracker
from tests.measurements import measurement

STUDY = """
defaults: [_base, _self_]
study_name: tracked
trials: 3
outputs: {home}/outputs
storage: sqlite:///{home}/studies.db
model: {{source: {model}}}
space: {{num_hidden_layers: {{low: 3, high: 5}}}}
text: {{window: 32, calibration_windows: 4, shards: 6}}
evaluation: {{backend: transformers, device: cpu, speed: predicted}}
"""


@pytest.fixture
def home(tmp_path, pico_llama):
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "tracked.yaml").write_text(STUDY.format(home=tmp_path, model=pico_llama))
    return tmp_path


def run(home, uri, *words):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    (home / ".env").write_text(f"MLFLOW_TRACKING_URI={uri}\n")  # as for DagsHub
    done = subprocess.run(
        [sys.executable, "-m", "search.cli", "run", "--study", "tracked", *words],
        cwd=home, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def runs_of(uri, name="optuna-search"):
    """The parent run, the baseline's and the trials' of the only study in an experiment."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(name)
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if PARENT in r.data.tags]
    nested = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    (baseline,) = [r for r in nested if "baseline" in r.data.tags]
    trials = {int(r.data.tags[TRIAL]): r for r in nested if TRIAL in r.data.tags}
    assert len(runs) == 2 + len(trials)
    return client, parent, baseline, trials


@pytest.mark.long
def test_a_study_is_a_parent_run_with_a_nested_run_for_each_trial_and_the_baseline(home):
    uri = f"sqlite:///{home}/runs.db"
    run(home, uri)
    run(home, uri, "--trials", "4")  # goes on: nothing is tracked twice
    client, parent, baseline, trials = runs_of(uri)
    assert sorted(trials) == [0, 1, 2, 3]
    complete = [r for r in trials.values() if r.data.tags["state"] == "COMPLETE"]
    for tracked in (baseline, *complete):
        assert set(PARAMETERS) <= set(tracked.data.params)
        assert set(METRICS) - set(OF_ANSWERS) == set(tracked.data.metrics)  # nothing was generated
        assert tracked.info.status == "FINISHED"
    assert baseline.data.metrics["score"] == 0.5
    assert baseline.data.params["number_of_layers"] == "5"
    for pruned in (r for r in trials.values() if r.data.tags["state"] == "PRUNED"):
        assert "reason" in pruned.data.tags
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["trials_finished"] == 4
    assert parent.data.metrics["score"] == max(r.data.metrics["score"] for r in complete)
    assert "scores.png" in {file.path for file in client.list_artifacts(parent.info.run_id)}


# -- the parent run --------------------------------------------------------------------------------------------

BASE = CompressionPlan(5, 8, 4, 96, 160, "bfloat16")


def measured():
    return measurement(shard_nll=(1.0,), model_size_mb=0.5, total_parameters=1000)


def add(study, layers, score=None, reason="", **more):
    """A trial that has ended: measured with a Score, or pruned for a reason."""
    plan = dataclasses.replace(BASE, num_hidden_layers=layers).to_dict()
    numbers = {"perf_norm": 0.9, "perf_norm_se": 0.02, "speed_norm": layers / 10, "speed_norm_se": 0.0,
               "score_se": 0.01, "perplexity": 20.0, "time_per_token_ms": 2.0, "tokens_per_sec": 500.0,
               "model_size_mb": layers / 10, "total_parameters": 200 * layers}  # fmt: skip
    attrs = {"plan": plan, "stage": "done", **({"reason": reason} if score is None else numbers), **more}
    states = optuna.trial.TrialState
    study.add_trial(
        optuna.trial.create_trial(
            state=states.PRUNED if score is None else states.COMPLETE, value=score, user_attrs=attrs
        )
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/runs.db"


@pytest.fixture
def track(store, tmp_path, monkeypatch):
    """Track a study as a call of `run` does; returns the warnings."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setattr(mlflow_runs, "FLUSH_S", 600.0)  # other tests may have all cores
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)

    def call(study, experiment="optuna-search", change=lambda: None, **options):
        said = []
        tracker = Tracker(Tracking(experiment=experiment), study, measured(), 0.5, said.append)
        change()
        tracker.trial_ended(set())
        tracker.close(**options)
        return said

    yield call
    mlflow.set_tracking_uri(before)


@pytest.fixture
def study(tmp_path):
    study = optuna.create_study(
        storage=f"sqlite:///{tmp_path}/study.db", study_name=tmp_path.name, direction="maximize"
    )
    study.set_user_attr("file", {"trials": 4, "score": {"weight_perf": 0.5, "weight_speed": 0.5}})
    study.set_user_attr("baseline", measured().to_dict())
    return study


@pytest.mark.long
def test_the_parent_run_has_the_result_and_a_resumed_study_updates_it(store, track, study):
    add(study, 4, reason="screen: 0.2 | weak")
    assert track(study, study.study_name) == []
    client, first, *_ = runs_of(store, study.study_name)
    assert first.data.metrics == {f"trials_{n}": float(n in ("finished", "pruned")) for n in COUNTS}
    assert "best_trial" not in first.data.tags

    add(study, 3, 0.6)
    assert track(study, study.study_name, change=lambda: add(study, 2, 0.7)) == []
    client, parent, _, trials = runs_of(store, study.study_name)
    assert parent.info.run_id == first.info.run_id
    assert parent.info.status == "FINISHED"
    assert parent.info.end_time >= first.info.end_time
    best = trials[2]
    known = [name for name in METRICS if name not in OF_ANSWERS]
    assert {name: parent.data.metrics[name] for name in known} == dict(best.data.metrics)
    assert (parent.data.metrics["score"], parent.data.metrics["score_se"]) == (0.7, 0.01)
    assert parent.data.metrics["trials_complete"] == 2
    tags = parent.data.tags
    assert (tags["best_trial"], tags["best_score"]) == ("2", "0.7000 ± 0.0100")
    assert tags["best_plan"].startswith("2L 8/4H ")
    assert "**Best: trial 2, Score 0.7000 ± 0.0100**" in tags["mlflow.note.content"]
    assert "| num_hidden_layers | 2 |" in tags["mlflow.note.content"]

    place = Path(client.download_artifacts(parent.info.run_id, "."))
    assert {file.name for file in place.iterdir()} == {
        *("trials.csv", "pareto.csv", "pareto.md", "best.json", "status.html", "scores.png")
    }
    rows = list(csv.DictReader((place / "trials.csv").open(encoding="utf-8", newline="")))
    assert [(row["trial"], row["state"], row["num_hidden_layers"]) for row in rows] == [
        ("0", "PRUNED", "4"), ("1", "COMPLETE", "3"), ("2", "COMPLETE", "2")]  # fmt: skip
    assert (rows[0]["reason"], rows[2]["score"], rows[2]["score_se"]) == ("screen: 0.2 | weak", "0.7", "0.01")
    assert "| 1 | 3L 8/4H " in (place / "pareto.md").read_text(encoding="utf-8")
    assert json.loads((place / "best.json").read_text())["plan"]["num_hidden_layers"] == 2
    assert "3 of 4 trials finished" in (place / "status.html").read_text(encoding="utf-8")
    assert (place / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_sizes_are_metrics_too_and_no_parameter_has_two_names(store, track, study):
    add(study, 3, 0.6)
    track(study, study.study_name, files=False)
    client, parent, baseline, trials = runs_of(store, study.study_name)
    assert not client.list_artifacts(parent.info.run_id)
    for tracked in (baseline, trials[0]):
        for size in ("model_size_mb", "total_parameters"):
            assert tracked.data.metrics[size] == float(tracked.data.params[size])
        assert {"number_of_layers", "number_of_heads", "hidden_dim"} <= tracked.data.params.keys()
        assert not {"num_hidden_layers", "num_attention_heads", "hidden_size"} & tracked.data.params.keys()
    assert trials[0].data.params["number_of_layers"] == "3"
    assert trials[0].data.params["intermediate_size"] == "160"


def test_files_that_can_not_be_stored_cost_one_warning_and_no_number(store, track, study, tmp_path):
    import mlflow

    (tmp_path / "file").write_text("")
    nowhere = f"file://{tmp_path}/file/in/a/file"
    mlflow.MlflowClient(store).create_experiment(study.study_name, artifact_location=nowhere)
    add(study, 3, 0.6)
    (said,) = track(study, study.study_name)
    assert said.startswith("MLflow: the study's tables and plots are not stored: ")
    _, parent, _, trials = runs_of(store, study.study_name)
    assert (parent.info.status, parent.data.metrics["score"], sorted(trials)) == ("FINISHED", 0.6, [0])


# -- studies of one name, and several processes of one study ---------------------------------------------------


def test_a_study_that_is_begun_anew_under_the_same_name_has_runs_of_its_own(store, track, tmp_path):
    import mlflow

    name = tmp_path.name
    for number, score in enumerate((0.6, 0.7)):
        again = optuna.create_study(storage=f"sqlite:///{tmp_path}/{number}.db", study_name=name, direction="maximize")
        again.set_user_attr("file", {"trials": 4, "score": {"weight_perf": 0.5, "weight_speed": 0.5}})
        again.set_user_attr("baseline", measured().to_dict())
        again.set_user_attr(mlflow_runs.ID, f"begun-{number}")
        add(again, 3, score)
        for _ in range(2):
            assert track(again, name, files=False) == []
    client = mlflow.MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    parents = [run for run in runs if PARENT in run.data.tags]
    assert sorted(run.data.metrics["score"] for run in parents) == [0.6, 0.7]
    for parent in parents:
        nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert len(nested) == 2  # the baseline and the trial
        (trial,) = [run for run in nested if TRIAL in run.data.tags]
        assert trial.data.metrics["score"] == parent.data.metrics["score"]


def test_trials_of_a_process_that_is_still_there_are_left_to_it(store, track, study):
    other = subprocess.Popen(["sleep", "1000"])
    worker = {**processes.identify_worker(), "pid": other.pid, "started": processes._started(other.pid)}
    try:
        add(study, 3, 0.6)
        add(study, 2, 0.7, worker=worker)
        add(study, 4, 0.65, worker={**worker, "boot": "another machine"})
        track(study, study.study_name, files=False)
        *_, trials = runs_of(store, study.study_name)
        assert sorted(trials) == [0, 2]  # a process of another machine can't be seen, and may be gone
    finally:
        other.kill()
        other.wait()
    track(study, study.study_name, files=False)
    *_, trials = runs_of(store, study.study_name)
    assert sorted(trials) == [0, 1, 2]


# -- servers that can't be reached -----------------------------------------------------------------------------


@pytest.mark.long
def test_an_unreachable_server_is_given_up_and_costs_no_trial(home):
    done = run(home, "http://127.0.0.1:9")
    assert "3 of 3 trials finished" in done.stdout
    assert done.stderr.count("MLflow") == 1
    assert "Traceback" not in done.stderr
    # MLflow would retry for four minutes: then the run's end would say that some runs were not written in time
    assert "MLflow: not tracked from here on" in done.stderr
