"""What optuna-search itself adds to a study: everything but screening, building and measuring.

    python benchmarks/overhead.py sqlite:///outputs/studies.db STUDY

From the study's storage: each trial's own stage clocks against its start and end, and the gaps between trials
(asking, telling, notes, artifacts, attributes, counting). What MLflow's thread uses of the processor comes from a timed
run of it.
"""

import contextlib
import os
import sys
import tempfile
import time

import optuna

from evaluator.measurement import Measurement
from search.study import mlflow_runs, storage

WORK = ("cheap screen", "screen", "build", "measure")


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = storage.load(storage.open_storage(sys.argv[1]), sys.argv[2])
    trials = [trial for trial in study.trials if trial.datetime_complete is not None]
    wall = (trials[-1].datetime_complete - trials[0].datetime_start).total_seconds()
    work = sum(trial.user_attrs["seconds"].get(stage, 0.0) for trial in trials for stage in WORK)
    inside = sum((trial.datetime_complete - trial.datetime_start).total_seconds() for trial in trials) - work
    print(f"{len(trials)} trials in {wall:.1f} s, of which screening, building and measuring {work:.1f} s")
    print(f"inside trials {inside:.2f} s, between them {wall - work - inside:.2f} s: {100 * (wall - work) / wall:.2f}%")
    baseline = Measurement.from_dict(study.user_attrs["baseline"])
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(None):
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch}/runs.db"
        mlflow_runs.load_environment()
        began = time.thread_time()
        runs = mlflow_runs._Runs("overhead", {mlflow_runs.PARENT: study.study_name}, baseline, 0.5, ())
        started = time.thread_time()
        runs.catch_up(study)
        ended = time.thread_time()
    print(
        f"MLflow's thread: {started - began:.2f} s for its store, {ended - started:.2f} s for the trials, beside them"
    )


if __name__ == "__main__":
    main()
