"""Tests of storages, resuming and counting, with real databases and killed processes."""

import subprocess
import sys
import textwrap

import optuna
import pytest
from optuna.trial import TrialState

from search.config.study_file import Pruner, Sampler
from search.errors import StorageError, StudyMismatch, UsageError
from search.study import rungs, samplers
from search.study import storage as study_storage
from search.study import trials as study_trials

DEFINITION = {"model": {"digest": "a"}, "space": {"precision": ["bfloat16", "W8A8"]}, "score": {"weight_perf": 0.5}}


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/deep/studies.db"


def test_sqlite_is_opened_with_a_write_ahead_log_and_a_heartbeat(url, tmp_path):
    import sqlite3

    storage = study_storage.open_storage(url)
    assert storage.get_heartbeat_interval() == study_storage.HEARTBEAT_S
    with sqlite3.connect(tmp_path / "deep/studies.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("nonsense", "not a database URL"),
        ("postgresql://u@host:abc/db", "port in its URL is no number"),
        ("postgresql://u@[::1/db", "port in its URL is no number"),
        ("mysql://host:5 432/db", "port in its URL is no number"),
        ("sqlite:///:memory:", "needs a file"),
        ("postgresql://me:secret@127.0.0.1:9/db", "127.0.0.1"),
        ("nosuchdb://x", "nosuchdb"),
    ],
)
def test_an_unusable_storage_is_reported_in_one_line_without_the_password(bad, said):
    with pytest.raises(StorageError) as caught:
        study_storage.open_storage(bad)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused_and_not_changed(tmp_path):
    path = tmp_path / "notes.db"
    path.write_text("these are notes, not a database\n" * 50)
    with pytest.raises(StorageError, match="not a database"):
        study_storage.open_storage(f"sqlite:///{path}")
    assert path.read_text().startswith("these are notes")


@pytest.mark.parametrize("options", ["", "?timeout=30"])
def test_a_database_exists_whatever_options_its_url_has(url, options):
    assert not study_storage.exists(url + options)
    study_storage.open_storage(url)
    assert study_storage.exists(url + options)


def test_another_number_of_workers_on_a_cpu_is_told_by_the_option_that_sets_it(url):
    storage, threads = study_storage.open_storage(url), {"evaluation": {"threads": 1}}
    study_storage.create_or_resume(storage, "s", {**DEFINITION, **threads})
    with pytest.raises(StudyMismatch, match="cores over --workers, is 1 there and null here"):
        study_storage.create_or_resume(storage, "s", {**DEFINITION, "evaluation": {"threads": None}})


def test_another_definition_is_refused_with_the_differences(url):
    storage = study_storage.open_storage(url)
    study_storage.create_or_resume(storage, "s", DEFINITION)
    assert study_storage.create_or_resume(storage, "s", DEFINITION).study_name == "s"
    changed = {**DEFINITION, "space": {"precision": ["bfloat16", "W4A16"]}}
    with pytest.raises(StudyMismatch) as caught:
        study_storage.create_or_resume(storage, "s", changed)
    assert 'space.precision is ["bfloat16", "W8A8"] there and ["bfloat16", "W4A16"] here' in str(caught.value)
    assert "model" not in str(caught.value).replace("precision", "")


def test_a_study_of_another_program_is_refused(url):
    storage = study_storage.open_storage(url)
    optuna.create_study(storage=storage, study_name="foreign", direction="maximize").ask()
    with pytest.raises(StudyMismatch, match="not created by optuna-search"):
        study_storage.create_or_resume(storage, "foreign", DEFINITION)


def test_an_unknown_study_is_refused_with_the_names_of_the_others(url):
    storage = study_storage.open_storage(url)
    study_storage.create_or_resume(storage, "mine", DEFINITION)
    with pytest.raises(UsageError, match="holds mine"):
        study_storage.load(storage, "yours")


WORKER = """
    import os, sys
    from search import processes
    from search.study import storage
    study = storage.load(storage.open_storage(sys.argv[1]), "s")
    trial = study.ask()
    trial.suggest_int("num_hidden_layers", 1, 30)
    trial.set_user_attr("worker", processes.identify_worker())
    trial.set_user_attr("plan", trial.params)
    trial.report(0.25, 1)
    print(trial.params["num_hidden_layers"], flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), 9)
    sys.stdin.read()
"""


def start_worker(url, what):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORKER), url, what],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.long
def test_a_killed_workers_trial_is_failed_and_queued_again_at_once(url):
    study = study_storage.create_or_resume(study_storage.open_storage(url), "s", DEFINITION)
    worker = start_worker(url, "die")
    layers = int(worker.stdout.readline())
    assert worker.wait() == -9
    assert study_trials.retry_dead(study) == [0]
    assert study_trials.retry_dead(study) == []
    dead, again = study.trials
    assert dead.state == TrialState.FAIL
    assert again.state == TrialState.WAITING
    assert again.params == {"num_hidden_layers": layers}
    assert again.intermediate_values == {}
    assert again.user_attrs == {}
    assert study_trials.finished(study.trials) == []


@pytest.mark.long
def test_a_trial_that_always_kills_its_worker_is_not_tried_for_ever(url):
    study = study_storage.create_or_resume(study_storage.open_storage(url), "s", DEFINITION)
    for _ in range(study_trials.MAX_RETRIES + 1):
        worker = start_worker(url, "die")
        worker.communicate()
        assert len(study_trials.retry_dead(study)) == 1
    assert not study.get_trials(states=(TrialState.WAITING,))
    (given_up,) = study_trials.finished(study.trials)
    assert given_up.user_attrs["failure"] == "Killed"
    assert len({trial.params["num_hidden_layers"] for trial in study.trials}) == 1


@pytest.mark.long
def test_the_trial_of_a_living_worker_is_not_failed(url):
    study = study_storage.create_or_resume(study_storage.open_storage(url), "s", DEFINITION)
    worker = start_worker(url, "wait")
    worker.stdout.readline()
    try:
        assert study_trials.retry_dead(study) == []
        assert study.trials[0].state == TrialState.RUNNING
    finally:
        worker.communicate()


def test_only_trials_that_ended_by_themselves_are_finished(url):
    study = study_storage.create_or_resume(study_storage.open_storage(url), "s", DEFINITION)

    def end(state, **attrs):
        trial = study.ask()
        for name, value in attrs.items():
            trial.set_user_attr(name, value)
        study.tell(trial, 0.5 if state == TrialState.COMPLETE else None, state=state)

    end(TrialState.COMPLETE)
    end(TrialState.PRUNED)
    end(TrialState.FAIL, failure="NotFinite")
    end(TrialState.FAIL)  # killed
    end(TrialState.FAIL, failure=study_trials.INTERRUPTED)
    study.ask()
    assert [trial.number for trial in study_trials.finished(study.trials)] == [0, 1, 2]


def test_a_resumed_sampler_draws_the_same_values_as_an_uninterrupted_one(url):
    def objective(trial):
        return -abs(trial.suggest_int("x", 0, 1000) - 300)

    def run(study, trials):
        while (done := len(study_trials.finished(study.trials))) < trials:
            study.sampler = samplers.sampler(Sampler(n_startup_trials=4), 7, 0, done)
            study.optimize(objective, n_trials=1)
        return [trial.params["x"] for trial in study.trials]

    whole = run(optuna.create_study(direction="maximize"), 12)
    storage = study_storage.open_storage(url)
    run(study_storage.create_or_resume(storage, "s", DEFINITION), 5)
    assert run(study_storage.load(study_storage.open_storage(url), "s"), 12) == whole
    other = [samplers.sampler(Sampler(), seed, worker, 0) for seed, worker in ((7, 0), (7, 1), (8, 0))]
    drawn = set()
    for sampler in other:
        study = optuna.create_study(sampler=sampler)
        drawn.add(study.ask().suggest_int("x", 0, 10**9))
    assert len(drawn) == 3


@pytest.mark.parametrize("name", ["wilcoxon", "median", "hyperband"])
def test_each_pruner_prunes_a_clearly_worse_trial(name):
    settings = Pruner(name=name, n_startup_steps=2, n_startup_trials=2)
    running_mean = rungs.are_running_means(settings)
    # hyperband's brackets depend on the study's name
    study = optuna.create_study(study_name="a", direction="maximize", pruner=samplers.pruner(settings, shards=9))
    shards = [0.1, 0.5, -0.3, 0.2, -0.1, 0.4, 0.0, -0.2, 0.3]

    def objective(trial, level):
        values = []
        for index, shard in enumerate(shards):
            values.append(level + shard)
            trial.report(sum(values) / len(values) if running_mean else values[-1], index + 1)
            if trial.should_prune():
                raise optuna.TrialPruned
        return level

    for _ in range(6):
        study.optimize(lambda trial: objective(trial, 1.0), n_trials=1)
    study.optimize(lambda trial: objective(trial, 0.2), n_trials=3)
    assert TrialState.PRUNED in [trial.state for trial in study.trials[6:]]
    assert len(study.trials[-1].intermediate_values) < len(shards) or name == "hyperband"
