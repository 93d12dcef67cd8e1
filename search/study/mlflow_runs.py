"""MLflow: one parent run a study, a nested run a trial, a run tagged `baseline`. Nothing else here knows MLflow.

Runs are written from a thread of their own, out of what the study's storage holds: a trial never waits for a
server, and a trial that was finished but not yet tracked when the study was killed is tracked when it goes on.
A server that can't be reached costs one warning.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dotenv
import optuna

from evaluator import measurement
from evaluator.measurement import Measurement
from search.config.study_file import Tracking
from search.study import trials as studies

PARENT, TRIAL = "optuna_search.study", "optuna_search.trial"
PARAMETERS = tuple(name for name, metric in measurement.METRICS.items() if metric.mlflow == "parameter")
METRICS = (
    *(name for name, metric in measurement.METRICS.items() if metric.mlflow == "metric"),
    *("perf_norm", "speed_norm", "score"),
)
FLUSH_S = 60.0


def load_environment(directory: Path = Path()) -> None:
    """`.env` (DagsHub: MLFLOW_TRACKING_URI, _USERNAME, _PASSWORD); the environment itself comes first."""
    dotenv.load_dotenv(directory / ".env", override=False)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the defaults block for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")


class Tracker:
    """Follows a study into MLflow until `close`."""

    def __init__(
        self,
        settings: Tracking,
        study: optuna.Study,
        baseline: Measurement,
        baseline_score: float,
        warn: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._study_name, self._storage = study.study_name, study._storage
        self._baseline, self._baseline_score = baseline, baseline_score
        self._warn = warn
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, name="mlflow", daemon=True)
        if settings.mlflow:
            load_environment()
            self._thread.start()

    def trial_ended(self) -> None:
        self._wake.put(True)

    def close(self) -> None:
        """Tracks what is left, for at most FLUSH_S seconds."""
        if self._thread.is_alive():
            self._wake.put(False)
            self._thread.join(FLUSH_S)
            if self._thread.is_alive():
                self._warn("MLflow: some runs were not written in time; `optuna-search run` again writes them")

    def _follow(self) -> None:
        try:
            runs = _Runs(self._settings.experiment, self._study_name, self._baseline, self._baseline_score)
            study = optuna.load_study(storage=self._storage, study_name=self._study_name)
            going_on = True
            while going_on:
                runs.catch_up(studies.finished(study.get_trials(deepcopy=False)))
                going_on = self._wake.get()
                with contextlib.suppress(queue.Empty):
                    while going_on:  # several trials ended meanwhile: one catching up does for all
                        going_on = self._wake.get_nowait()
            runs.catch_up(studies.finished(study.get_trials(deepcopy=False)))
            runs.end()
        except Exception as error:  # a tracker never takes a study down
            first = (str(error).splitlines() or [type(error).__name__])[0][:200]
            self._warn(
                f"MLflow: not tracked from here on: {first}; the study goes on, and running it again "
                "later tracks the rest"
            )


def log_by_hand(
    settings: Tracking,
    name: str,
    values: Mapping[str, Any],
    tags: Mapping[str, str],
    began: float,
    warn: Callable[[str], None],
) -> None:
    """One finished run, begun at `began` (time.time): what `baseline` and `evaluate` measured.

    A server that can't be reached costs one warning.
    """
    if not settings.mlflow:
        return
    load_environment()
    try:
        client, experiment = _client(settings.experiment)
        _log(client, experiment, name, tags, values, "FINISHED", int(began * 1000), int(time.time() * 1000))
    except Exception as error:  # a tracker never takes a measurement down
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        warn(f"MLflow: {name} is not tracked: {first}")


def _client(experiment: str) -> tuple[Any, str]:
    """MLflow's client, and the experiment's id: made where there is none."""
    with _quiet():
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri("sqlite:///mlflow.db")
        client = mlflow.MlflowClient()
        found = client.get_experiment_by_name(experiment)
        return client, str(found.experiment_id if found else client.create_experiment(experiment))


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

    run = client.create_run(experiment, start_time=start, tags=dict(tags), run_name=name)
    metrics = [Metric(key, float(values[key]), end, 0) for key in METRICS if values.get(key) is not None]
    params = [Param(key, str(value)) for key, value in values.items() if key not in METRICS and value is not None]
    client.log_batch(run.info.run_id, metrics=metrics, params=params)
    client.set_terminated(run.info.run_id, status=status, end_time=end)


class _Runs:
    def __init__(self, experiment: str, study_name: str, baseline: Measurement, baseline_score: float) -> None:
        self._client, self._experiment = _client(experiment)
        self._parent = self._only_run({PARENT: study_name}, study_name)
        self._tracked = set()
        baseline_there = False
        for run in self._search({"mlflow.parentRunId": self._parent}):
            if run.info.status == "RUNNING":  # begun when the study was killed: it is written again
                self._client.set_terminated(run.info.run_id, status="KILLED")
            elif run.info.status != "KILLED":
                baseline_there |= "baseline" in run.data.tags
                self._tracked |= {int(run.data.tags[TRIAL])} if TRIAL in run.data.tags else set()
        tags = {"mlflow.parentRunId": self._parent, "baseline": "true"}
        if not baseline_there:
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

    def catch_up(self, trials: list[optuna.trial.FrozenTrial]) -> None:
        for trial in trials:
            if trial.number in self._tracked:
                continue
            attrs = trial.user_attrs
            values: dict[str, Any] = {name: attrs[name] for name in (*PARAMETERS, *METRICS) if name in attrs}
            plan = attrs.get("plan", {})
            values |= {
                "number_of_layers": plan.get("num_hidden_layers"),
                "number_of_heads": plan.get("num_attention_heads"),
                "hidden_dim": plan.get("hidden_size"),
                "score": trial.value if trial.state == optuna.trial.TrialState.COMPLETE else None,
            }
            tags = {
                "mlflow.parentRunId": self._parent,
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
                {**plan, **values},
                status,
                _ms(trial.datetime_start),
                _ms(trial.datetime_complete),
            )
            self._tracked.add(trial.number)

    def end(self) -> None:
        self._client.set_terminated(self._parent)

    def _only_run(self, tags: Mapping[str, str], name: str) -> str:
        found = self._search(tags)
        run = found[0] if found else self._client.create_run(self._experiment, tags=dict(tags), run_name=name)
        return str(run.info.run_id)

    def _search(self, tags: Mapping[str, str]) -> list[Any]:
        clause = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found, token = [], None
        while True:
            page = self._client.search_runs(
                [self._experiment], filter_string=clause, max_results=1000, page_token=token
            )
            found += list(page)
            token = page.token
            if not token:
                return found


def measured(found: Measurement) -> dict[str, Any]:
    """Return the numbers of a measurement that MLflow has."""
    return {name: getattr(found, name) for name in (*PARAMETERS, *METRICS) if name in measurement.METRICS}


def _ms(moment: Any) -> int:
    return int(moment.timestamp() * 1000) if moment is not None else int(time.time() * 1000)


@contextlib.contextmanager
def _quiet() -> Any:
    """MLflow sets its own loggers up and tells of every migration."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
