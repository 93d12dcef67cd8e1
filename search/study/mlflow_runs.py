"""Writes a study to MLflow: a parent run for the study, a nested run for each trial, and a run tagged `baseline`.

The parent run has the study's result (`search.study.mlflow_result`), which is written again whenever it has changed.

A separate thread writes the runs from what the study's storage holds, so that no trial waits for a server. Trials that
were not tracked when a study was killed are tracked when it is resumed. Where several processes run one study, each
writes the trials of its own workers, and at its end what nobody else is there to write. A server that can't be reached
costs one warning. No other module imports MLflow.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import dotenv
import optuna

from evaluator import measurement
from evaluator.measurement import Measurement
from search import processes, secrets
from search.config.study_file import Tracking
from search.errors import StudyStopped
from search.study import best
from search.study.mlflow_result import METRICS, PARAMETERS, SIZES, Result
from search.study.trials import finished

PARENT, TRIAL = "optuna_search.study", "optuna_search.trial"
ID = "optuna_search.id"  # of a study, in its attributes and its parent run: another may have had its name before
WRITER = "optuna_search.writer"  # the process that writes a run
NAMED = {  # the names of these in the manual; each is written once
    "num_hidden_layers": "number_of_layers",
    "num_attention_heads": "number_of_heads",
    "hidden_size": "hidden_dim",
}
FLUSH_S = 60.0


def load_environment(directory: Path = Path()) -> None:
    """Load `.env` (MLFLOW_TRACKING_URI, _USERNAME, _PASSWORD); variables that are already set win."""
    dotenv.load_dotenv(directory / ".env", override=False)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the defaults block for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")


class Tracker:
    """Writes the trials of a study to MLflow as they end, until `close`."""

    def __init__(
        self,
        settings: Tracking,
        study: optuna.Study,
        baseline: Measurement,
        baseline_score: float,
        warn: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._study_name, self._storage, self._id = study.study_name, study._storage, study.user_attrs.get(ID, "")
        self._pids = {os.getpid()}
        self._baseline, self._baseline_score = baseline, baseline_score
        self._warn = warn
        self._files = True
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, name="mlflow", daemon=True)
        if settings.mlflow:
            load_environment()
            self._thread.start()

    def trial_ended(self, pids: set[int]) -> None:
        """Have the thread write the trials that have ended, those of these processes among them."""
        self._pids |= pids
        self._wake.put(True)

    def close(self, *, files: bool = True) -> None:
        """Write the remaining runs, for at most FLUSH_S seconds; without the tables and plots where time presses."""
        self._files = files
        if self._thread.is_alive():
            self._wake.put(False)
            self._thread.join(FLUSH_S)
            if self._thread.is_alive():
                self._warn("MLflow: some runs were not written in time; running `optuna-search run` again writes them")

    def _follow(self) -> None:
        try:
            named = {PARENT: self._study_name, **({ID: self._id} if self._id else {})}
            runs = _Runs(self._settings.experiment, named, self._baseline, self._baseline_score, self._pids)
            study = optuna.load_study(storage=self._storage, study_name=self._study_name)
            more = True
            while more:
                runs.catch_up(study)
                more = self._wake.get()
                with contextlib.suppress(queue.Empty):
                    while more:  # several trials may have ended meanwhile: catch up once for all of them
                        more = self._wake.get_nowait()
            runs.catch_up(study, all_ended=True)
            runs.end()
            if self._files:
                self._store_files(runs, study)
        except StudyStopped:
            return  # the study's database is away: the run itself tells it
        except Exception as error:  # tracking must not end a study
            first = secrets.line_of(error)
            self._warn(
                f"MLflow: not tracked from here on: {first}; the study continues, and running it again "
                "later tracks the rest"
            )

    def _store_files(self, runs: _Runs, study: optuna.Study) -> None:
        try:
            runs.store_files(study)
        except Exception as error:  # servers may keep files elsewhere, out of reach: the numbers are there
            self._warn(f"MLflow: the study's tables and plots are not stored: {secrets.line_of(error)}")


def log_by_hand(
    settings: Tracking,
    name: str,
    values: Mapping[str, Any],
    tags: Mapping[str, str],
    began: float,
    warn: Callable[[str], None],
) -> None:
    """Write one finished run with the results of `baseline` or `evaluate`; failing to do so costs one warning.

    Args:
        settings: The tracking section of the study file.
        name: The name of the run.
        values: The metrics and parameters.
        tags: The tags of the run.
        began: The time at which the run began, in seconds as `time.time` returns it.
        warn: A function that prints a warning.
    """
    if not settings.mlflow:
        return
    load_environment()
    try:
        client, experiment = _client(settings.experiment)
        _log(client, experiment, name, tags, values, "FINISHED", int(began * 1000), int(time.time() * 1000))
    except Exception as error:  # tracking must not end a measurement
        first = secrets.line_of(error)
        warn(f"MLflow: {name} is not tracked: {first}")


def _client(experiment: str) -> tuple[Any, str]:
    """Return MLflow's client and the id of the experiment, which is created where it does not exist."""
    with _quiet():
        import mlflow

        # given to the client, since one that is set stays for the process; in full, since MLflow keeps the database
        # that a relative path named first
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"
        client = mlflow.MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(experiment)
        return client, str(known.experiment_id if known else client.create_experiment(experiment))


def _log(
    client: Any,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    values: Mapping[str, Any],
    status: str,
    start: int,
    end: int,
) -> None:
    from mlflow.entities import Metric, Param

    run = client.create_run(experiment, start_time=start, tags=secrets.masked_values(tags), run_name=name)
    metrics = [Metric(key, float(values[key]), end, 0) for key in METRICS if values.get(key) is not None]
    named = {NAMED.get(key, key): value for key, value in values.items() if key not in METRICS or key in SIZES}
    params = [Param(key, secrets.masked_places(str(value))) for key, value in named.items() if value is not None]
    client.log_batch(run.info.run_id, metrics=metrics, params=params)
    client.set_terminated(run.info.run_id, status=status, end_time=end)


class _Runs:
    def __init__(
        self,
        experiment: str,
        named: Mapping[str, str],
        baseline: Measurement,
        baseline_score: float,
        pids: Collection[int],
    ) -> None:
        self._client, self._experiment = _client(experiment)
        self._parent = self._only_run(named, named[PARENT])
        self._client.update_run(self._parent, status="RUNNING")  # a resumed study has ended before
        self._known: tuple[Mapping[str, float], Mapping[str, str]] | None = None
        self._pids = pids
        self._tracked: set[int] = set()
        tags = {"mlflow.parentRunId": self._parent, "baseline": "true", **_writer()}
        if not self._look():
            now = int(time.time() * 1000)
            _log(
                self._client,
                self._experiment,
                "baseline",
                tags,
                {**measured(baseline), "perf_norm": 1.0, "speed_norm": 0.0, "score": baseline_score},
                "FINISHED",
                now,
                now,
            )

    def _look(self) -> bool:
        """Find which trials are written; return whether the baseline is."""
        has_baseline = False
        for run in self._search({"mlflow.parentRunId": self._parent}):
            tags = run.data.tags
            if run.info.status == "RUNNING" and _is_abandoned(tags):  # it is written again
                self._client.set_terminated(run.info.run_id, status="KILLED")
            elif run.info.status != "KILLED":
                has_baseline |= "baseline" in tags
                self._tracked |= {int(tags[TRIAL])} if TRIAL in tags else set()
        return has_baseline

    def catch_up(self, study: optuna.Study, *, all_ended: bool = False) -> None:
        """Write the trials that have ended and are not written yet, and the study's result.

        Args:
            study: The study.
            all_ended: Write the trials of other machines' processes too, which can't be seen from here.
        """
        trials = [trial for trial in finished(study.get_trials(deepcopy=False)) if trial.number not in self._tracked]
        mine = [trial for trial in trials if self._is_mine(trial, all_ended=all_ended)]
        if mine and all_ended:
            self._look()
        self._log_trials([trial for trial in mine if trial.number not in self._tracked])
        result = Result.of(study)
        known = (result.metrics(), result.tags())
        if known != self._known:
            self._log_result(*known)
            self._known = known

    def _is_mine(self, trial: optuna.trial.FrozenTrial, *, all_ended: bool) -> bool:
        """Return whether this process is to write a trial: its worker is one of its own, or is gone."""
        worker = trial.user_attrs.get("worker")
        if worker is None or (worker["pid"] in self._pids and processes.visible(worker)):
            return True
        is_there = processes.alive(worker)
        return all_ended if is_there is None else not is_there

    def store_files(self, study: optuna.Study) -> None:
        """Write the tables and plots of the study; those of the same name are replaced."""
        with tempfile.TemporaryDirectory() as scratch:
            Result.of(study).write(Path(scratch))
            self._client.log_artifacts(self._parent, scratch)

    def _log_result(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Write the result to the parent run: metrics and tags can be written again, and parameters cannot."""
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._parent,
            metrics=[Metric(name, value, now, int(metrics["trials_finished"])) for name, value in metrics.items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )

    def _log_trials(self, trials: list[optuna.trial.FrozenTrial]) -> None:
        for trial in trials:
            attrs = trial.user_attrs
            values: dict[str, Any] = {name: attrs[name] for name in (*PARAMETERS, *METRICS) if name in attrs}
            values["score"] = best.score_of(trial)
            tags = {
                "mlflow.parentRunId": self._parent,
                **_writer(),
                TRIAL: str(trial.number),
                "state": trial.state.name,
                "stage": attrs.get("stage", ""),
            }
            if "reason" in attrs:
                tags["reason"] = attrs["reason"]
            status = "FAILED" if trial.state == optuna.trial.TrialState.FAIL else "FINISHED"
            _log(
                self._client,
                self._experiment,
                f"trial-{trial.number}",
                tags,
                {**attrs.get("plan", {}), **values},
                status,
                _ms(trial.datetime_start),
                _ms(trial.datetime_complete),
            )
            self._tracked.add(trial.number)

    def end(self) -> None:
        self._client.set_terminated(self._parent)

    def _only_run(self, tags: Mapping[str, str], name: str) -> str:
        runs = self._search(tags)
        run = runs[0] if runs else self._client.create_run(self._experiment, tags=dict(tags), run_name=name)
        return str(run.info.run_id)

    def _search(self, tags: Mapping[str, str]) -> list[Any]:
        clause = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        runs, token = [], None
        while True:
            page = self._client.search_runs(
                [self._experiment], filter_string=clause, max_results=1000, page_token=token
            )
            runs += list(page)
            token = page.token
            if not token:
                return runs


def _writer() -> dict[str, str]:
    return {WRITER: json.dumps(processes.identify_worker())}


def _is_abandoned(tags: Mapping[str, str]) -> bool:
    """Return whether the process that began to write a run is gone, as far as that can be seen."""
    return WRITER not in tags or processes.alive(json.loads(tags[WRITER])) is not True


def measured(values: Measurement) -> dict[str, Any]:
    """Return the numbers of a measurement that are written to MLflow."""
    return {name: getattr(values, name) for name in (*PARAMETERS, *METRICS) if name in measurement.METRICS}


def _ms(moment: Any) -> int:
    return int(moment.timestamp() * 1000) if moment is not None else int(time.time() * 1000)


@contextlib.contextmanager
def _quiet() -> Any:
    """Silence MLflow's loggers, which report every migration; MLflow configures them itself when imported."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
