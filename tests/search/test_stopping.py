"""Signals at any moment of a trial: real signals, sent from within the statements of a real database."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap

import pytest
from optuna.trial import TrialState

from search import processes
from search.study import one_trial
from search.study import storage as study_storage
from search.study import trials as study_trials
from tests.waiting import AT_ONCE_S


@pytest.fixture(autouse=True)
def handlers():
    """Restore the signal handlers: after a signal, Stop keeps its own until the process ends."""
    before = {number: signal.getsignal(number) for number in processes.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def study(tmp_path):
    storage = study_storage.open_storage(f"sqlite:///{tmp_path}/studies.db")
    return study_storage.create_or_resume(storage, "s", {"a": 1})


@contextlib.contextmanager
def a_signal_at(event):
    """Send SIGINT to this process at this call or return of a Python function; yields a counter of these."""
    count = iter(range(10**9))

    def on_event(frame, kind, argument):
        if next(count) == event:
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGINT)

    sys.setprofile(on_event)
    try:
        yield count
    finally:
        sys.setprofile(None)


def run_trial(study, stop):
    """Run a trial as the real objective does, with every kind of call on the storage."""

    def objective(trial):
        trial.set_user_attr("worker", processes.identify_worker())
        try:
            with stop.released():
                value = float(trial.suggest_int("x", 0, 1000))
                for step in range(3):
                    trial.report(value, step)
                    trial.should_prune()
                trial.storage.set_trial_system_attr(trial._trial_id, "constraints", [0.0])
                return value
        except KeyboardInterrupt:
            trial.set_user_attr("failure", study_trials.INTERRUPTED)
            raise
        finally:
            trial.set_user_attr("stage", "done")

    with stop.held():
        one_trial.run_taken(study, study.ask(), objective)
    stop.check()


def test_a_call_on_the_database_is_finished_before_a_signal_raises(study):
    trial = study.ask()
    trial.set_user_attr("first", 0)  # later calls find SQLAlchemy's caches filled
    events = []
    for number in range(1, 4):  # what the garbage collector ends meanwhile counts too
        with a_signal_at(None) as count:
            trial.set_user_attr("first", number)
        events.append(next(count))
    moments = range(100, min(events) - 100, 100)
    assert len(moments) > 5
    for moment in moments:
        with processes.Stop() as stop:
            with pytest.raises(KeyboardInterrupt), a_signal_at(moment):
                trial.set_user_attr(f"at {moment}", 1)
            assert stop.asked
    assert set(study.trials[0].user_attrs) == {"first", *(f"at {moment}" for moment in moments)}


@pytest.mark.slow
def test_a_signal_at_any_moment_leaves_the_trial_recorded_and_the_database_free(study, tmp_path):
    with a_signal_at(None) as count, processes.Stop() as stop:
        run_trial(study, stop)
    events = next(count)
    moments = random.Random(4)
    for _ in range(1000):
        moment = moments.randrange(events)
        with contextlib.suppress(KeyboardInterrupt), processes.Stop() as stop, a_signal_at(moment):
            run_trial(study, stop)
        with contextlib.closing(sqlite3.connect(tmp_path / "studies.db", timeout=0)) as other:
            other.execute("BEGIN IMMEDIATE")  # locked, if a transaction was left open
        assert not study.get_trials(states=(TrialState.RUNNING,)), f"at event {moment}"
    ends = [trial.user_attrs.get("failure", trial.state.name) for trial in study.trials]
    assert set(ends) == {"COMPLETE", study_trials.INTERRUPTED}


def test_a_signal_in_a_call_raises_once_after_it_and_a_later_call_ends_normally():
    ended = []

    def call(number):
        os.kill(os.getpid(), number)
        ended.append(number)
        return number

    with processes.Stop() as stop:
        with pytest.raises(KeyboardInterrupt):
            processes.uninterrupted(lambda: call(signal.SIGTERM))
        assert ended == [signal.SIGTERM]
        assert processes.uninterrupted(lambda: 3) == 3
        assert processes.uninterrupted(lambda: call(signal.SIGTERM)) == signal.SIGTERM
    assert stop.number == signal.SIGTERM
    assert processes.exit_status() == 128 + signal.SIGTERM


SLOW_TO_STOP = """
    import os, signal, sys, time
    from search import processes
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    with processes.Stop() as stop, stop.held():
        print("ready", flush=True)
        while not stop.asked:
            time.sleep(0.01)
        print("asked", flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ([signal.SIGINT, signal.SIGINT], 130),
        ([signal.SIGTERM, signal.SIGINT], 143),
        ([signal.SIGHUP, signal.SIGINT], 129),
    ],
)
def test_a_second_ctrl_c_ends_the_process_at_once_in_one_line(signals, status):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW_TO_STOP)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signals[0])
        assert process.stdout.readline() == "asked\n"  # its clock runs from when it has handled the first
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(processes.IMPATIENT_S + 0.2)
        process.send_signal(signals[1])
        _, err = process.communicate(timeout=AT_ONCE_S)
    finally:
        process.kill()
    assert process.returncode == status
    assert err == "stopped at once; run the same command again to resume\n"


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)
