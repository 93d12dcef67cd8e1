"""Where a study stands: progress, best, Pareto front, what was pruned and failed and why, what was distilled.

Reads only the storage, and whether what was distilled is still there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.study import trials as studies

DISTILLED = "distilled"  # the study's attribute that holds the rows of its finalists (`search.finalists`)


def of(study: optuna.Study) -> dict[str, Any]:
    """JSON: numbers of trials by state, the best feasible trial, the Pareto front of PerfNorm against SpeedNorm,
    the distilled finalists.
    """
    trials = study.get_trials(deepcopy=False)
    done = studies.finished(trials)
    complete = [trial for trial in done if trial.state == TrialState.COMPLETE]
    best = max(complete, key=lambda trial: trial.value or 0.0, default=None)
    distilled = by_score(study.user_attrs.get(DISTILLED, []))
    return {
        "study": study.study_name,
        "trials": study.user_attrs.get("file", {}).get("trials"),
        "finished": len(done),
        "complete": len(complete),
        "pruned": sum(trial.state == TrialState.PRUNED for trial in done),
        "failed": sum(trial.state == TrialState.FAIL for trial in done),
        "running": sum(trial.state == TrialState.RUNNING for trial in trials),
        "waiting": sum(trial.state == TrialState.WAITING for trial in trials),
        "baseline": study.user_attrs.get("baseline"),
        "best": None if best is None else summary(best),
        "pareto": [summary(trial) for trial in pareto(complete)],
        "pruned_at": dict(
            Counter(trial.user_attrs.get("stage", "") for trial in done if trial.state == TrialState.PRUNED)
        ),
        "ended": [summary(trial) for trial in done if trial.state != TrialState.COMPLETE],
        "distilled": distilled,
        "best_of_all": best_of_all(best, distilled),
    }


def by_score(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of finalists, the best Score first; those that failed last."""
    return sorted(rows, key=lambda row: -row["after"]["score"] if "after" in row else 1.0)


def best_of_all(best: FrozenTrial | None, distilled: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The best of the trials and of what was distilled of them and is still there; path: of the latter's model, else
    None.
    """
    if best is None:
        return None
    found = {"trial": best.number, "path": None, "score": best.value, "score_se": best.user_attrs.get("score_se")}
    for row in distilled:
        if "after" in row and row["after"]["score"] > (found["score"] or 0.0) and is_there(row):
            after = row["after"]
            found = {key: row[key] for key in ("trial", "path")} | {key: after[key] for key in ("score", "score_se")}
    return found


def is_there(row: Mapping[str, Any]) -> bool:
    """Whether a distilled model is where its row says, from this directory."""
    return (Path(row["path"]) / "model.safetensors").is_file()


def summary(trial: FrozenTrial) -> dict[str, Any]:
    attrs = trial.user_attrs
    wanted = (
        "perf_norm",
        "perf_norm_se",
        "speed_norm",
        "speed_norm_se",
        "score_se",
        "perplexity",
        "kl_nats_per_token",
        "time_per_token_ms",
        "model_size_mb",
        "total_parameters",
        "stage",
        "reason",
        "failure",
        "plan",
    )
    found = {name: attrs[name] for name in wanted if name in attrs}
    score = trial.value if trial.state == TrialState.COMPLETE else None
    return {"trial": trial.number, "state": trial.state.name, "score": score, **found}


def pareto(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that no other beats in PerfNorm without losing SpeedNorm, by falling PerfNorm."""
    front: list[FrozenTrial] = []
    for trial in sorted(trials, key=lambda t: (-t.user_attrs["perf_norm"], -t.user_attrs["speed_norm"])):
        if not front or trial.user_attrs["speed_norm"] > front[-1].user_attrs["speed_norm"]:
            front.append(trial)
    return front
