"""Storages that are created twice at once, are held by others, fail in the middle, or have silent workers."""

import contextlib
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import optuna
import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from search import processes
from search.errors import StorageError, StudyMismatch, StudyStopped, no_space
from search.study import faults, steady
from search.study import storage as study_storage
from search.study import trials as study_trials
from tests.waiting import AT_ONCE_S, until

DEFINITION = {"model": {"digest": "a"}}


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/deep/studies.db"


@pytest.fixture
def told():
    return []


@pytest.fixture
def open_patiently(url, told, monkeypatch):
    monkeypatch.setattr(study_storage, "BUSY_S", 0.1)

    def opened(seconds):
        return study_storage.open_storage(url, steady.Patience(seconds, told.append))

    return opened


def create(url, barrier, answers):
    try:
        barrier.wait()
        study = study_storage.create_or_resume(study_storage.open_storage(url), "s", DEFINITION)
        answers.put(study.user_attrs["definition"])
    except BaseException as error:
        answers.put(repr(error))


@pytest.mark.parametrize("repeats", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_runs_that_begin_at_once_create_one_database_and_one_study(tmp_path, repeats):
    fork = multiprocessing.get_context("fork")
    for repeat in range(repeats):
        url = f"sqlite:///{tmp_path}/{repeat}/studies.db"
        barrier, answers = fork.Barrier(4), fork.SimpleQueue()
        runs = [fork.Process(target=create, args=(url, barrier, answers)) for _ in range(4)]
        for run in runs:
            run.start()
        assert [answers.get() for _ in runs] == [DEFINITION] * 4
        for run in runs:
            run.join()


def test_a_study_whose_creation_was_cut_short_is_taken_over(url):
    storage = study_storage.open_storage(url)
    optuna.create_study(storage=storage, study_name="s", direction="maximize")  # and killed before the definition
    assert study_storage.find(storage, "s", DEFINITION) is None
    study = study_storage.create_or_resume(storage, "s", DEFINITION)
    assert study.user_attrs["definition"] == DEFINITION
    with pytest.raises(StudyMismatch):
        study_storage.create_or_resume(storage, "s", {"model": {"digest": "b"}})


def fail(study, trial, **attrs):
    for name, value in {"plan": dict(trial.params), **attrs}.items():
        trial.set_user_attr(name, value)
    study.tell(trial, state=TrialState.FAIL)


@pytest.mark.parametrize("attrs", [{}, {"failure": study_trials.INTERRUPTED}], ids=["killed", "interrupted"])
def test_a_trial_that_is_tried_again_keeps_its_place_in_the_queue(url, attrs):
    study = study_storage.create_or_resume(study_storage.open_storage(url), "s", DEFINITION)
    for x in range(4):
        study.enqueue_trial({"x": x})
    drawn = []
    for ends in [False, False, True, True, False, True, True]:  # the first one fails twice
        trial = study.ask()
        drawn.append(trial.suggest_int("x", 0, 9))
        if ends:
            study.tell(trial, 0.5)
        else:
            fail(study, trial, **attrs)
            study_trials.requeue(study)
    assert drawn == [0, 0, 0, 1, 2, 2, 3]


def test_a_trial_that_was_failed_by_a_process_that_died_at_once_is_queued_again_and_only_once(url):
    study = study_storage.create_or_resume(study_storage.open_storage(url), "s", DEFINITION)
    trial = study.ask()
    trial.suggest_int("x", 0, 9)
    fail(study, trial)  # and killed before it queued the parameters again
    study_trials.retry_dead(study)
    study_trials.retry_dead(study)
    assert [again.params for again in study.get_trials(states=(TrialState.WAITING,))] == [trial.params]


def test_a_trial_that_ended_before_it_had_a_plan_is_not_queued_again(url):
    """The next one draws the same: its seed depends on the number of finished trials."""
    study = study_storage.create_or_resume(study_storage.open_storage(url), "s", DEFINITION)
    trial = study.ask()
    trial.suggest_int("x", 0, 9)
    study.tell(trial, state=TrialState.FAIL)
    study_trials.requeue(study)
    assert len(study.trials) == 1


@contextlib.contextmanager
def held_by_another(tmp_path, until_told=None):
    """Hold the database; where a list of warnings is given, until half a second after the first."""
    other = sqlite3.connect(tmp_path / "deep/studies.db", check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")

    def release():
        until(lambda: until_told, AT_ONCE_S)
        time.sleep(0.5)  # other attempts fail meanwhile
        other.rollback()

    releasing = threading.Thread(target=release)
    if until_told is not None:
        releasing.start()
    try:
        yield
    finally:
        if until_told is not None:
            releasing.join()
        other.rollback()


def test_a_database_that_is_away_for_a_while_costs_one_warning(open_patiently, told, tmp_path):
    study = study_storage.create_or_resume(open_patiently(20), "s", DEFINITION)
    with held_by_another(tmp_path, until_told=told):
        study.set_user_attr("a", 1)
        study.set_user_attr("b", 2)
    assert {"a", "b"} <= set(study.user_attrs)
    assert len(told) == 1
    assert "database is locked; trying again for 20 s" in told[0]


@pytest.mark.long
def test_a_database_that_stays_away_stops_the_study_in_one_line_and_for_good(
    open_patiently, told, tmp_path, monkeypatch
):
    study = study_storage.create_or_resume(open_patiently(3), "s", DEFINITION)
    with held_by_another(tmp_path):
        with pytest.raises(StudyStopped) as caught:
            study.set_user_attr("a", 1)
        without_waiting = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: pytest.fail("it waits again"))
        monkeypatch.setattr(steady, "time", without_waiting)
        with pytest.raises(StudyStopped):
            study.set_user_attr("a", 1)
    assert "\n" not in str(caught.value)
    assert "studies.db" in str(caught.value)
    assert "nothing is lost" in str(caught.value)
    assert len(told) == 1


def test_a_command_that_only_reads_does_not_wait(open_patiently, told, tmp_path):
    study = study_storage.create_or_resume(open_patiently(0), "s", DEFINITION)
    with held_by_another(tmp_path), pytest.raises(StorageError, match="database is locked"):
        study.set_user_attr("a", 1)
    assert told == []


@contextlib.contextmanager
def sigterm_after(seconds):
    timer = threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGTERM])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def test_a_signal_ends_the_waiting_for_a_database(open_patiently, told, tmp_path):
    study = study_storage.create_or_resume(open_patiently(60), "s", DEFINITION)
    before = {number: signal.getsignal(number) for number in processes.SIGNALS}
    began = time.monotonic()
    try:
        with (
            held_by_another(tmp_path),
            pytest.raises(KeyboardInterrupt),
            processes.Stop() as stop,
            stop.held(),
            sigterm_after(1.0),  # only now: without the handlers it would end the tests
        ):
            study.set_user_attr("a", 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert time.monotonic() - began < 40  # it would have waited a minute


@pytest.mark.parametrize("call", ["create_new_trial", "set_trial_state_values"])
def test_a_call_whose_answer_was_lost_is_not_carried_out_twice(open_patiently, call, monkeypatch):
    storage = open_patiently(5)
    study = study_storage.create_or_resume(storage, "s", DEFINITION)
    trial = study.ask()
    name = "_create_new_trial" if call == "create_new_trial" else call
    carry_out, lost = getattr(storage.plain, name), []

    def lose_the_answer(*args, **kwargs):
        result = carry_out(*args, **kwargs)
        if not lost:
            lost.append(True)
            cause = sqlalchemy.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("database is locked"))
            cause.orig.sqlite_errorname = "SQLITE_BUSY"
            raise StorageInternalError("An exception is raised during the commit.") from cause
        return result

    monkeypatch.setattr(storage.plain, name, lose_the_answer)
    if call == "create_new_trial":
        study.enqueue_trial({"x": 3})
        assert len(study.trials) == 2
    else:
        study.tell(trial, 0.5)
        assert study.trials[0].value == 0.5
    assert lost


def test_a_silent_worker_is_given_time_after_an_outage(url, monkeypatch):
    """By a clock and heartbeats that are set: waiting for real, a busy machine is taken for a silent worker."""
    now = 1000.0
    monkeypatch.setattr(steady, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))
    study = study_storage.create_or_resume(study_storage.open_storage(url), "s", DEFINITION)
    trial = study.ask()
    trial.set_user_attr("worker", {**processes.identify_worker(), "namespace": "pid:[1]"})

    def silent_for(seconds):
        """Set the last heartbeat this far back."""
        with trial.storage.plain.engine.begin() as connection:
            back = f"UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-{seconds} seconds')"
            assert connection.exec_driver_sql(back).rowcount == 1

    trial.storage.record_heartbeat(trial._trial_id)
    silent_for(study_trials.GRACE_S + 10)
    assert study_trials.retry_dead(study) == []  # the machine may have slept: it is looked at again
    now += 0.9 * steady.ASIDE_S
    assert study_trials.retry_dead(study) == []
    trial.storage.record_heartbeat(trial._trial_id)
    silent_for(study_trials.GRACE_S // 2)
    assert study_trials.retry_dead(study) == []  # not for long
    silent_for(study_trials.GRACE_S // 2 + 10)
    now += 0.9 * steady.ASIDE_S
    assert study_trials.retry_dead(study) == []  # silent anew
    now += 1.1 * steady.ASIDE_S
    assert study_trials.retry_dead(study) == [0]


def test_a_zombie_is_dead():
    child = subprocess.Popen([sys.executable, "-c", ""])
    worker = {**processes.identify_worker(), "pid": child.pid, "started": processes._started(child.pid)}
    assert until(lambda: processes.alive(worker) is False)  # not yet waited for
    child.wait()


def test_a_process_in_another_container_is_neither_alive_nor_dead():
    here = processes.identify_worker()
    assert processes.alive(here) is True
    assert processes.alive({**here, "started": "1"}) is False
    for other in ({"namespace": "pid:[1]"}, {"boot": "another"}):
        assert processes.alive({**here, **other}) is None
    old = {name: here[name] for name in ("host", "pid", "started")}  # of a study begun by an older version
    assert processes.alive(old) is True
    assert processes.alive({**old, "host": "elsewhere"}) is None


def test_a_full_disk_is_told_with_its_place():
    with pytest.raises(ValueError) as caught:  # noqa: PT011, PT012 as a library raises it
        try:
            raise OSError(28, "No space left on device", "/data/model.safetensors")
        except OSError as error:
            raise ValueError("the checkpoint can't be written") from error
    said = no_space(caught.value)
    assert said.startswith("/data/model.safetensors: no space left on device; nothing is lost")
    assert no_space(ValueError("I/O error: No space left on device (os error 28)"))
    assert no_space(OSError(13, "Permission denied", "/data")) is None


def test_a_full_or_unwritable_database_is_not_waited_for(url, open_patiently):
    study = study_storage.create_or_resume(open_patiently(60), "s", DEFINITION)
    with study._storage.plain.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    limit = lambda connection, record: connection.execute(f"PRAGMA max_page_count = {pages}")  # noqa: E731
    sqlalchemy.event.listen(study._storage.plain.engine, "connect", limit)
    study._storage.plain.engine.dispose()
    with pytest.raises(StudyStopped, match="database or disk is full; nothing is lost: free some space"):
        study.set_user_attr("large", "x" * 10**6)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (sqlalchemy.exc.OperationalError("", {}, Exception("server closed the connection unexpectedly")), True),
        (sqlalchemy.exc.InterfaceError("", {}, Exception("connection already closed")), True),
        (sqlalchemy.exc.OperationalError("", {}, sqlite3.OperationalError("disk I/O error")), False),
        (sqlalchemy.exc.OperationalError("", {}, sqlite3.OperationalError("no such table: trials")), False),
        (sqlalchemy.exc.DataError("", {}, Exception("value too long")), None),
        (sqlalchemy.exc.IntegrityError("", {}, Exception("not unique")), None),
        (ValueError("x"), None),
    ],
)
def test_faults_of_a_database_are_told_from_errors_in_what_is_stored(error, passes):
    fault = faults.of(error)
    assert (fault and fault.passes) is passes
