"""A worker process: reads the study file from the first line of standard input, then `go` for each trial.

It writes an event per line to standard output, and ends with its input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import optuna
import torch

from search import processes, secrets
from search.config.study_file import StudyFile
from search.errors import SearchError
from search.failures import FAILURES, why
from search.say import print_warnings
from search.setup.setting import prepare
from search.stages.bench import Bench
from search.study import storage
from search.study.one_trial import Event, Watch, run_one
from search.study.steady import Patience


def _lines() -> Iterator[str]:
    while line := sys.stdin.readline():
        yield line.strip()


def _end_with_parent() -> None:
    """Stop as by Ctrl-C when the process that hands out the trials is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def main(index: int, threads: int) -> None:
    """Run trials until standard input ends.

    Args:
        index: The worker's number.
        threads: The number of threads of its engines; 0: as many as there are cores.
    """
    secrets.install()
    lines = _lines()
    file = StudyFile.from_line(next(lines))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output; events must not be mixed with that

    def watch(event: Event) -> None:
        try:
            print(json.dumps(event), file=out, flush=True)
        except OSError:
            raise KeyboardInterrupt from None  # nobody listens any more

    threading.Thread(target=_end_with_parent, daemon=True).start()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print_warnings()
    warnings.filterwarnings("ignore")
    with contextlib.suppress(KeyboardInterrupt), processes.Stop() as stop:
        try:
            _work(index, threads, file, lines, watch, stop)
        except SearchError as error:
            watch({"event": "stopped", "text": str(error)})
            sys.exit(error.exit_status)
        except FAILURES as error:  # it could not start: its GPU may be full, or its engine's library broken
            watch({"event": "warn", "text": f"worker {index}: {why(error)['reason']}"})
            sys.exit(1)


def _work(index: int, threads: int, file: StudyFile, lines: Iterator[str], watch: Watch, stop: processes.Stop) -> None:
    setting = prepare(file)
    if threads:
        torch.set_num_threads(threads)
        setting = dataclasses.replace(setting, machine=dataclasses.replace(setting.machine, threads=threads))
    patience = Patience(file.storage_patience, lambda text: watch({"event": "away", "text": text}))
    study = storage.load(storage.open_storage(file.storage, patience), file.study_name)
    with Bench.of(setting) as bench:
        baseline = bench.baseline(lambda text: watch({"event": "say", "text": text}))
        for _ in lines:
            had_one = run_one(study, bench, baseline, index, watch, stop)
            watch({"event": "idle", "had_one": had_one})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
