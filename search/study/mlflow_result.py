"""Says what the parent run of a study holds in MLflow: its result as metrics, tags, a note, tables and plots.

MLflow itself is not imported here.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna

from compressors.plan import short
from evaluator import measurement
from search.show import verdict
from search.show.study_state import StudyState, TrialSummary
from search.study import status
from search.study.trials import finished

BEST_TRIAL, BEST_SCORE, BEST_PLAN = "best_trial", "best_score", "best_plan"  # tags, which can be set again
PARAMETERS = tuple(name for name, metric in measurement.METRICS.items() if metric.mlflow == "parameter")
SIZES = tuple(name for name in PARAMETERS if measurement.METRICS[name].attribute)  # measured: metrics too
METRICS = (
    *(name for name, metric in measurement.METRICS.items() if metric.mlflow == "metric"),
    *SIZES,
    *("perf_norm", "speed_norm", "score"),
)
SCORES = ("score", "score_se", "perf_norm", "perf_norm_se", "speed_norm", "speed_norm_se")
COUNTS = ("finished", "complete", "pruned", "failed")
LENGTH = 5000  # the characters that a tag may have in every version of MLflow's stores


@dataclasses.dataclass(frozen=True)
class Result:
    """Result holds what is known of a study at one time.

    Attributes:
        state: Where the study stands.
        trials: Its finished trials.
        weights: The weights of PerfNorm and SpeedNorm in the Score.
        numbers: The numbers of the best trial that its own run has.
    """

    state: StudyState
    trials: tuple[TrialSummary, ...]
    weights: tuple[float, float]
    numbers: Mapping[str, float]

    @classmethod
    def of(cls, study: optuna.Study) -> Result:
        """Return the result of a study as its storage holds it."""
        weights = study.user_attrs.get("file", {}).get("score", {})
        ended = finished(study.get_trials(deepcopy=False))
        state = status.of(study)
        attrs = next((t.user_attrs for t in ended if state.best is not None and t.number == state.best.trial), {})
        return cls(
            state,
            tuple(map(status.summary, ended)),
            (float(weights.get("weight_perf", 0.5)), float(weights.get("weight_speed", 0.5))),
            {name: float(attrs[name]) for name in METRICS if name in attrs},
        )

    def metrics(self) -> dict[str, float]:
        """Return the numbers of the best trial, by the names that a trial's run has, and the numbers of trials."""
        counts = {f"trials_{name}": float(getattr(self.state, name)) for name in COUNTS}
        best = self.state.best
        if best is None:
            return counts
        scores = {name: getattr(best, name) for name in SCORES}
        return {**self.numbers, **{name: float(value) for name, value in scores.items() if value is not None}, **counts}

    def tags(self) -> dict[str, str]:
        """Return the number, the Score and the plan of the best trial, and the note that MLflow shows."""
        best = self.state.best
        note = {"mlflow.note.content": self.note()[:LENGTH]}
        if best is None:
            return note
        plan = "" if best.plan is None else short(best.plan)
        return {
            **note,
            BEST_TRIAL: str(best.trial),
            BEST_SCORE: _with_error(best.score, best.score_se),
            BEST_PLAN: plan,
        }

    def note(self) -> str:
        """Return the result in Markdown: the best trial, its plan, and the Pareto front."""
        state, best = self.state, self.state.best
        counts = ", ".join(f"{getattr(state, name)} {name}" for name in COUNTS[1:] if getattr(state, name))
        goal = [] if state.goal.is_default else [f"Goal: {state.goal}", ""]
        lines = [*goal, f"{state.finished} of {state.trials} trials finished ({counts})", ""]
        if best is None:
            return "\n".join([*lines, verdict.no_feasible(state) or "No trial is measured yet."])
        told = best.result or f"Score {_with_error(best.score, best.score_se)}"
        lines += [f"**Best: trial {best.trial}, {told}**", ""]
        if best.plan is not None:
            lines += [*_markdown(("plan", ""), best.plan.to_dict().items()), ""]
        if state.confirmed_best is not None:
            lines += [f"**{verdict.of_confirmed(state.confirmed_best)}**", ""]
        return "\n".join([*lines, "Pareto front:", "", *self.front()])

    def front(self) -> list[str]:
        """Return the Pareto front as a table in Markdown."""
        titles = ("trial", "plan", "PerfNorm", "SpeedNorm", "Score", "perplexity", "MB")
        best = -1 if self.state.best is None else self.state.best.trial
        rows = [
            (
                f"{'★' if one.trial == best else ''}{one.trial}",
                "" if one.plan is None else short(one.plan),
                _with_error(one.perf_norm, one.perf_norm_se),
                _with_error(one.speed_norm, one.speed_norm_se),
                _with_error(one.score, one.score_se),
                _number(one.metrics.get("perplexity"), ".3f"),
                _number(one.metrics.get("model_size_mb"), ".1f"),
            )
            for one in self.state.pareto
        ]
        return _markdown(titles, rows)

    def write(self, directory: Path) -> None:
        """Write the tables and the plot of the study into a directory."""
        from rich.console import Console

        from search.show import plots, tables  # matplotlib and plotly: only where something is drawn

        (directory / "trials.csv").write_text(_csv(self.trials), encoding="utf-8", newline="")
        (directory / "pareto.csv").write_text(_csv(self.state.pareto), encoding="utf-8", newline="")
        (directory / "pareto.md").write_text("\n".join([*self.front(), ""]), encoding="utf-8")
        if self.state.best is not None:
            text = json.dumps(self.state.best.to_dict(), indent=1)
            (directory / "best.json").write_text(text, encoding="utf-8")
        console = Console(record=True, file=io.StringIO(), width=160)
        console.print(tables.status_table(self.state))
        console.save_html(str(directory / "status.html"), inline_styles=True)
        measured = [one.row() for one in self.trials if one.score is not None and one.perf_norm is not None]
        if measured:
            plots.plot_scores(measured, directory / "scores.png", *self.weights, self.state.stands_out)


def _csv(trials: Sequence[TrialSummary]) -> str:
    """Return a row for each trial: its numbers, its plan, and why it ended."""
    rows = []
    for one in trials:
        values = one.to_dict()
        plan = values.pop("plan", {})
        rows.append({**values, **plan})
    last = ("failure", "reason")
    names = dict.fromkeys(name for row in rows for name in row if name not in last)
    out = io.StringIO()
    writer = csv.DictWriter(out, [*names, *last] if rows else ["trial", *last])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _markdown(titles: Sequence[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _with_error(value: float | None, error: float | None) -> str:
    return _number(value, ".4f") + ("" if error is None else f" ± {error:.4f}")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
