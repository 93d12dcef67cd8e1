"""Who runs the trials that are handed out: this process, or several, one process per GPU."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

import optuna
import torch

from evaluator.measurement import Measurement
from search import processes
from search.errors import StudyStopped
from search.setup.setting import Setting
from search.stages.bench import Bench
from search.study.one_trial import Event, Watch, run_one


class Team(Protocol):
    """Workers that each run one trial at a time. Use it with `with`."""

    @property
    def pids(self) -> set[int]:
        """The processes that run trials."""

    @property
    def size(self) -> int:
        """The number of trials that run at once."""

    @property
    def idle(self) -> bool:
        """Whether a worker can take a trial."""

    def go(self) -> None:
        """Have an idle worker take a trial."""

    def wait(self) -> bool:
        """Return when a worker has ended its trial, or found none to take: whether it had one.

        Raises:
            StudyStopped: No worker is left, or the study can't continue.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class InProcess:
    """A team of one: `go` remembers, `wait` works."""

    def __init__(
        self, study: optuna.Study, bench: Bench, baseline: Measurement, watch: Watch, stop: processes.Stop
    ) -> None:
        self._work: Callable[[], bool] = lambda: run_one(study, bench, baseline, 0, watch, stop)
        self._idle = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    @property
    def pids(self) -> set[int]:
        """This process."""
        return {os.getpid()}

    @property
    def size(self) -> int:
        """One."""
        return 1

    @property
    def idle(self) -> bool:
        """Whether no trial is to be taken."""
        return self._idle

    def go(self) -> None:
        """Remember that a trial is to be taken."""
        self._idle = False

    def wait(self) -> bool:
        """Take a trial and run it."""
        self._idle = True
        return self._work()


class Processes:
    """One process per GPU, or for a share of the cores, each with its engines."""

    def __init__(self, setting: Setting, workers: int, watch: Watch) -> None:
        self._watch = watch
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._free: list[int] = []
        self._processes = [self._start(setting, index) for index in range(workers)]
        self._free = list(range(workers))

    def _start(self, setting: Setting, index: int) -> subprocess.Popen[str]:
        environment = dict(os.environ)
        if setting.machine.device == "cuda":
            visible = environment.get(
                "CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))
            ).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[index % len(visible)]
        process = subprocess.Popen(
            [sys.executable, "-m", "search.study.worker", str(index), str(setting.machine.threads or 0)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then closes theirs
        )
        assert process.stdin is not None
        process.stdin.write(setting.file.to_line() + "\n")
        process.stdin.flush()
        threading.Thread(target=self._listen, args=(process, index), daemon=True).start()
        return process

    def _listen(self, process: subprocess.Popen[str], index: int) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._events.put({"worker": index, **json.loads(line)})
        self._events.put({"event": "gone", "worker": index, "status": process.wait()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()  # the end of input: a worker finishes, records and goes
            if kind is not None and process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()

    @property
    def pids(self) -> set[int]:
        """The workers' processes."""
        return {process.pid for process in self._processes}

    @property
    def size(self) -> int:
        """The number of workers that are left."""
        return max(sum(process.poll() is None for process in self._processes), 1)

    @property
    def idle(self) -> bool:
        """Whether a worker can take a trial."""
        return bool(self._free)

    def go(self) -> None:
        """Have an idle worker take a trial."""
        index = self._free.pop(0)
        stdin = self._processes[index].stdin
        assert stdin is not None
        with contextlib.suppress(OSError):  # its death is told by `wait`
            stdin.write("go\n")
            stdin.flush()

    def wait(self) -> bool:
        """Return when one trial has ended; a worker that died is not replaced, and its trial is tried again.

        Raises:
            StudyStopped: All workers are gone, or one says that the study can't continue.
        """
        while True:
            event = self._events.get()
            if event["event"] == "idle":
                self._free.append(event["worker"])
                return bool(event["had_one"])
            if event["event"] == "stopped":
                raise StudyStopped(event["text"])
            if event["event"] == "gone":
                if self._lose(event):
                    return True
                continue
            self._watch(event)

    def _lose(self, event: Event) -> bool:
        """Take note that a worker is gone; return whether it had a trial in hand."""
        if all(process.poll() is not None for process in self._processes):
            raise StudyStopped(
                f"all workers are gone (the last with exit status {event['status']}); see the messages above, and run "
                "it again"
            )
        self._watch({"event": "warn", "text": f"worker {event['worker']} is gone; the others continue"})
        if event["worker"] not in self._free:
            return True
        self._free.remove(event["worker"])
        return False
