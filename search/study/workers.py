"""Runs a study until it holds N finished trials: one worker in this process, or several, one process per GPU.

The process that was started hands out the trials, so that exactly N are finished whatever the number of
workers. A worker reads a word per line from standard input (`go`, or the end) and writes an event per line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import torch

from evaluator.measurement import Measurement
from search import processes
from search.config.study_file import StudyFile
from search.errors import StudyStopped, UsageError
from search.setup.setting import Setting, prepare
from search.stages.bench import BUILDING, Bench
from search.study import dashboard, mlflow_runs, samplers, space
from search.study import storage as study_storage
from search.study import trials as study_trials
from search.study.objective import Objective, TrialFailed
from search.study.record import Record

Event = dict[str, Any]
Watch = Callable[[Event], None]


def run(
    file: StudyFile, workers: int = 1, watch: Watch = lambda _: None, stop: processes.Stop | None = None
) -> optuna.Study:
    """Create the study or go on with it until it holds `file.trials` finished trials.

    Raises UsageError and its kin before anything is written, StudyStopped when the study can't go on.
    KeyboardInterrupt leaves the running trial recorded and queued again.
    """

    stop = stop or processes.Stop()

    def say(text: str) -> None:
        stop.check()
        watch({"event": "say", "text": text})

    setting = shared(prepare(file, say), workers)
    storage = study_storage.open_storage(file.storage) if study_storage.exists(file.storage) else None
    if storage is not None:
        study_storage.find(
            storage, file.study_name, setting.definition
        )  # a mismatch is told before the baseline is measured
    sweep(setting.outputs / "checkpoints")
    with Bench(setting, say) as bench:
        baseline = bench.baseline()
        storage = storage or study_storage.open_storage(file.storage)
        the_study = study_storage.create_or_resume(storage, file.study_name, setting.definition)
        the_study.set_user_attr(
            "file", file.model_dump(mode="json", exclude={"storage"})
        )  # its URL may hold a password
        if the_study.user_attrs.get("baseline") != baseline.to_dict():
            the_study.set_user_attr("baseline", baseline.to_dict())
        _enqueue_uncut(the_study, setting)
        tracker = mlflow_runs.Tracker(
            file.tracking,
            the_study,
            baseline,
            file.score.weight_perf,
            warn=lambda text: watch({"event": "warn", "text": text}),
        )
        dashboard.describe_study(the_study, baseline, file.score.weight_perf)
        try:
            if workers == 1:
                team: Any = _InProcess(bench, the_study, baseline, watch, stop)
            else:
                bench.close()
                team = _Processes(setting, workers, watch)
            with team:
                _until_finished(the_study, setting, team, watch, tracker, baseline, stop)
        finally:
            tracker.close()
    return the_study


def _until_finished(
    the_study: optuna.Study,
    setting: Setting,
    team: Any,
    watch: Watch,
    tracker: mlflow_runs.Tracker,
    baseline: Measurement,
    stop: processes.Stop,
) -> None:
    file, busy, at_start = setting.file, 0, -1
    for number in study_trials.retry_dead(the_study):
        watch({"event": "warn", "text": f"trial {number} was killed: it is tried again"})
    while True:
        stop.check()
        trials = the_study.get_trials(deepcopy=False)
        done = study_trials.finished(trials)
        watch({"event": "done", "finished": len(done), "trials": file.trials, **_best(the_study), **_counts(done)})
        at_start = len(done) if at_start < 0 else at_start
        if len(done) < file.trials:
            _stop_if_hopeless(done[at_start:], file)
        elsewhere = _running_elsewhere(trials, team.pids)
        while team.idle and len(done) + busy + elsewhere < file.trials:
            team.go(len(done) + busy)
            busy += 1
        if busy == 0 and elsewhere:
            time.sleep(2)  # another `run` is at the last trials; should it die, they are taken over
            study_trials.retry_dead(the_study)
            continue
        if busy == 0:
            return
        team.wait()
        busy -= 1
        study_trials.retry_dead(the_study)
        dashboard.describe_study(the_study, baseline, file.score.weight_perf)
        keep_best_checkpoints(the_study, setting)
        tracker.trial_ended()


def _running_elsewhere(trials: list[optuna.trial.FrozenTrial], pids: set[int]) -> int:
    """Trials that the workers of another `run` have in hand."""
    running = [trial for trial in trials if trial.state == optuna.trial.TrialState.RUNNING]
    return sum(trial.user_attrs.get("worker", {"pid": None})["pid"] not in pids for trial in running)


def shared(setting: Setting, workers: int) -> Setting:
    """The setting of one of several workers here. Raises UsageError where their timings would disturb each other."""
    if workers == 1:
        return setting
    if setting.device == "cuda" and workers > torch.cuda.device_count():
        raise UsageError(
            f"--workers {workers}: there are {torch.cuda.device_count()} GPUs, and engines that share one disturb each "
            "other's timings; give each worker a GPU of its own"
        )
    threads = max(1, (os.cpu_count() or 1) // workers) if setting.device == "cpu" else None
    return dataclasses.replace(setting, threads=threads)


def sweep(directory: Path) -> None:
    """Remove what builds that were killed left half-written."""
    for scratch in directory.glob(f"{BUILDING}*"):
        pid = scratch.name.rpartition("-")[2]
        if not (pid.isdigit() and processes.process_alive(int(pid))):
            shutil.rmtree(scratch, ignore_errors=True)


def keep_best_checkpoints(the_study: optuna.Study, setting: Setting) -> None:
    """Delete this study's checkpoints but those of its best trials; `export` builds any of them again, bit for bit.

    Those of trials that failed after they were built go too.
    """
    trials = the_study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    best = sorted(complete, key=lambda trial: -(trial.value or 0.0))[: setting.file.limits.keep_checkpoints]
    running = [trial for trial in trials if trial.state == optuna.trial.TrialState.RUNNING]
    kept = {trial.user_attrs.get("checkpoint") for trial in (*best, *running)}
    failed = [trial for trial in trials if trial.state == optuna.trial.TrialState.FAIL]
    for trial in (*complete, *failed):
        name = trial.user_attrs.get("checkpoint")
        if name is not None and name not in kept:
            shutil.rmtree(setting.outputs / "checkpoints" / name, ignore_errors=True)


def _best(the_study: optuna.Study) -> Event:
    try:
        best = the_study.best_trial
    except ValueError:
        return {}
    return {"best": best.value, "best_trial": best.number}


def _counts(done: list[optuna.trial.FrozenTrial]) -> Event:
    states = [trial.state.name for trial in done]
    return {"pruned": states.count("PRUNED"), "failed": states.count("FAIL")}


def _stop_if_hopeless(done: list[optuna.trial.FrozenTrial], file: StudyFile) -> None:
    last = done[-file.limits.max_consecutive_failures :]
    if len(last) == file.limits.max_consecutive_failures and all(t.state == optuna.trial.TrialState.FAIL for t in last):
        reasons = [str(trial.user_attrs.get("reason")) for trial in last]
        raise StudyStopped(
            f"study {file.study_name!r}: the last {len(last)} trials failed, lately with: "
            f"{reasons[-1]}. Nothing is lost: mend "
            "the cause and run it again, with a higher limits.max_consecutive_failures if these "
            "failures are to be expected"
        )


def _enqueue_uncut(the_study: optuna.Study, setting: Setting) -> None:
    """The first trials cut nothing, one per precision, where the space holds them: the base model before the others.

    These are what people try by hand, and what is worse than the best of them is pruned from then on.
    """
    if the_study.get_trials(deepcopy=False):
        return
    for params in space.uncut(setting.file.space, setting.identity):
        the_study.enqueue_trial(params)


# -- one trial -----------------------------------------------------------------------------------------------


def _one_trial(
    the_study: optuna.Study,
    bench: Bench,
    baseline: Measurement,
    worker: int,
    done: int,
    watch: Watch,
    stop: processes.Stop,
) -> None:
    """Sampler and pruner are not in the storage, so they are made anew here."""
    file = bench.setting.file
    the_study.sampler = samplers.sampler(file.sampler, file.seed, worker, done)
    the_study.pruner = samplers.pruner(file.pruner, len(bench.setting.shards))

    def on_stage(record: Record) -> None:
        stop.check()
        watch({"event": "stage", "worker": worker, "trial": record.number, "stage": record.stage})

    objective = Objective(
        bench,
        baseline,
        on_stage=on_stage,
        on_end=lambda record: watch(_ended(record, worker)),
        interruptible=stop.released,
    )
    try:
        with stop.held():
            the_study.optimize(objective, n_trials=1, catch=(TrialFailed,))
        stop.check()
    except KeyboardInterrupt:
        _queue_interrupted(the_study)
        raise


def _ended(record: Record, worker: int) -> Event:
    return {
        "event": "end",
        "worker": worker,
        "trial": record.number,
        "stage": record.stage,
        "reason": record.reason,
        "failure": record.failure,
        "score": record.score.score if record.score else None,
        "plan": record.plan.to_dict() if record.plan else None,
        "seconds": round(sum(record.seconds.values()), 1),
    }


def _queue_interrupted(the_study: optuna.Study) -> None:
    mine = processes.identify_worker()
    trials = the_study.get_trials(deepcopy=True)
    retried = {number for trial in trials for number in trial.system_attrs.get("retry_history", [])}
    for trial in trials:
        attrs = trial.user_attrs
        if (
            attrs.get("failure") == study_trials.INTERRUPTED
            and attrs.get("worker") == mine
            and trial.number not in retried
        ):
            study_trials.retry_interrupted(the_study, trial)


class _InProcess:
    """A team of one: `go` remembers, `wait` works."""

    def __init__(
        self, bench: Bench, the_study: optuna.Study, baseline: Measurement, watch: Watch, stop: processes.Stop
    ) -> None:
        self._work: Callable[[int], None] = lambda done: _one_trial(the_study, bench, baseline, 0, done, watch, stop)
        self._next: int | None = None

    def __enter__(self) -> _InProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def pids(self) -> set[int]:
        return {os.getpid()}

    @property
    def idle(self) -> bool:
        return self._next is None

    def go(self, done: int) -> None:
        self._next = done

    def wait(self) -> None:
        done, self._next = self._next, None
        assert done is not None
        self._work(done)


class _Processes:
    """One process per GPU (or a share of the cores), each with its engines."""

    def __init__(self, setting: Setting, workers: int, watch: Watch) -> None:
        self._watch = watch
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._free: list[int] = []
        self._processes = [self._start(setting, index, workers) for index in range(workers)]
        self._free = list(range(workers))

    def _start(self, setting: Setting, index: int, workers: int) -> subprocess.Popen[str]:
        environment = dict(os.environ)
        if setting.device == "cuda":
            visible = environment.get(
                "CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))
            ).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[index % len(visible)]
        process = subprocess.Popen(
            [sys.executable, "-m", "search.study.workers", str(index), str(setting.threads or 0)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then closes theirs
        )
        assert process.stdin is not None
        process.stdin.write(setting.file.model_dump_json() + "\n")
        process.stdin.flush()
        threading.Thread(target=self._listen, args=(process, index), daemon=True).start()
        return process

    def _listen(self, process: subprocess.Popen[str], index: int) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._events.put({"worker": index, **json.loads(line)})
        self._events.put({"event": "gone", "worker": index, "status": process.wait()})

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()  # the end of input: a worker finishes, records and goes
            if exception[0] is not None and process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()

    @property
    def pids(self) -> set[int]:
        return {process.pid for process in self._processes}

    @property
    def idle(self) -> bool:
        return bool(self._free)

    def go(self, done: int) -> None:
        index = self._free.pop(0)
        stdin = self._processes[index].stdin
        assert stdin is not None
        with contextlib.suppress(OSError):  # its death is told by `wait`
            stdin.write(f"go {done}\n")
            stdin.flush()

    def wait(self) -> None:
        """Until one trial has ended. A worker that died is not replaced: its trial is tried again by another."""
        while True:
            event = self._events.get()
            if event["event"] == "idle":
                self._free.append(event["worker"])
                return
            if event["event"] == "gone":
                if all(process.poll() is not None for process in self._processes):
                    raise StudyStopped(
                        f"all workers are gone (the last with exit status {event['status']}); see the "
                        "messages above, and run it again"
                    )
                self._watch({"event": "warn", "text": f"worker {event['worker']} is gone; the others go on"})
                if event["worker"] not in self._free:
                    return  # with the trial that it had in hand
                self._free.remove(event["worker"])
                continue
            self._watch(event)


def _lines() -> Iterator[str]:
    while line := sys.stdin.readline():
        yield line.strip()


def _end_with_parent() -> None:
    """Stop as by Ctrl-C when the process that hands out the trials is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _main(index: int, threads: int) -> None:
    """A worker process: the study file on the first line, then `go N` for each trial."""
    lines = _lines()
    file = StudyFile.model_validate_json(next(lines))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output; events must not be mixed with that

    def watch(event: Event) -> None:
        try:
            print(json.dumps(event), file=out, flush=True)
        except OSError:
            raise KeyboardInterrupt from None  # nobody listens any more

    threading.Thread(target=_end_with_parent, daemon=True).start()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    setting = prepare(file)
    if threads:
        torch.set_num_threads(threads)
        setting = dataclasses.replace(setting, threads=threads)
    the_study = study_storage.load(study_storage.open_storage(file.storage), file.study_name)
    with (
        contextlib.suppress(KeyboardInterrupt),
        processes.Stop() as stop,
        Bench(setting, lambda text: watch({"event": "say", "text": text})) as bench,
    ):
        baseline = bench.baseline()
        for line in lines:
            _one_trial(the_study, bench, baseline, index, int(line.split()[1]), watch, stop)
            watch({"event": "idle"})


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
