"""Tests of tracking with MLflow itself: a store on disk, and a server that can't be reached."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from search.study.mlflow_runs import METRICS, PARAMETERS, PARENT, TRIAL

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


def test_a_study_is_a_parent_run_with_a_nested_run_for_each_trial_and_the_baseline(home):
    import mlflow

    uri = f"sqlite:///{home}/runs.db"
    run(home, uri)
    run(home, uri, "--trials", "4")  # goes on: nothing is tracked twice
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("optuna-search")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if PARENT in r.data.tags]
    nested = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    (baseline,) = [r for r in nested if "baseline" in r.data.tags]
    trials = [r for r in nested if TRIAL in r.data.tags]
    assert sorted(int(r.data.tags[TRIAL]) for r in trials) == [0, 1, 2, 3]
    assert len(runs) == 6
    for tracked in (baseline, *(r for r in trials if r.data.tags["state"] == "COMPLETE")):
        assert set(PARAMETERS) <= set(tracked.data.params)
        assert set(METRICS) == set(tracked.data.metrics)
        assert tracked.info.status == "FINISHED"
    assert baseline.data.metrics["score"] == 0.5
    assert baseline.data.params["number_of_layers"] == "5"
    for pruned in (r for r in trials if r.data.tags["state"] == "PRUNED"):
        assert "reason" in pruned.data.tags


def test_an_unreachable_server_costs_a_few_seconds_and_no_trial(home):
    began = time.monotonic()
    done = run(home, "http://127.0.0.1:9")
    assert "3 of 3 trials finished" in done.stdout
    assert done.stderr.count("MLflow") == 1
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 60
