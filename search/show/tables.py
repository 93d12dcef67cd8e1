"""Renders tables for people: a study's state, the comparison of evaluated models, and what `compress` will make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compressors.plan import short
from evaluator.measurement import METRICS
from evaluator.metrics import SCORE_COLUMN, UNKNOWN, Shown, short_count, shown
from search.show.rows import Result, Row, by_score
from search.show.study_state import BestOfAll, FinalistRow, StudyState, TrialSummary

COLUMNS = shown(METRICS, "column")
FRONT = shown(METRICS, "front")
MOST_ENDED = 12  # pruned and failed trials that are listed


def status_table(state: StudyState) -> RenderableType:
    """Return a study's state: a line, the baseline, the Pareto front, the reasons, and the distilled finalists."""
    states = ("complete", "pruned", "failed", "running", "waiting")
    counts = ", ".join(f"{getattr(state, name)} {name}" for name in states if getattr(state, name))
    more = (state.trials or 0) >= state.finished  # else a later call asked for fewer trials than there were
    done = f"{state.finished} of {state.trials}" if more else str(state.finished)
    parts: list[RenderableType] = [Text(f"study {state.study}: {done} trials finished ({counts})")]
    baseline = state.baseline
    if baseline is not None:
        parts.append(
            Text(
                f"baseline: perplexity {baseline.perplexity:.3f}, {baseline.time_per_token_ms:.2f} ms per token, "
                f"{baseline.model_size_mb:.1f} MB ({baseline.backend}, {baseline.device})"
            )
        )
    if state.pareto:
        parts.append(_pareto(state.pareto, state.best))
    if state.ended:
        parts.append(_reasons(state.ended))
    if state.distilled and state.best_of_all is not None:
        parts += _distilled(state.distilled, state.best_of_all)
    return Group(*parts)


def best_of_all_line(best: BestOfAll) -> str:
    """Return the line that names the best of the trials and the distilled models."""
    what = f"trial {best.trial}" + (f" distilled, {best.path}" if best.path else ", as it was")
    return f"best of all: {what}, Score {_with_se(best.score, best.score_se)}"


def comparison(rows: Iterable[Row]) -> Table:
    """Return the table of evaluated models, the best Score first; those that failed come last with their reasons."""
    table = Table(box=None, pad_edge=False)
    numbers = _around([one.title for one in COLUMNS.values()], ["PerfNorm", "SpeedNorm", "Score"], COLUMNS)
    for name in ("experiment", *numbers, "remark"):
        table.add_column(name, justify="left" if name in ("experiment", "remark") else "right")
    for row in by_score(rows):
        if row.result is None:
            table.add_row(row.name, *[""] * len(numbers), f"{row.failure}: {row.reason}")
        else:
            remark = row.remark or ("measured before" if row.before else "")
            table.add_row(row.name, *cells(row.result), remark)
    return table


def cells(result: Result) -> list[str]:
    """Return the cells of a row of the comparison, without its name and its remark."""
    score = result.score
    scored = [
        f"{score.perf_norm:.3f}±{score.perf_norm_se:.3f}",
        f"{score.speed_norm:.3f}±{score.speed_norm_se:.3f}",
        f"{score.score:.4f}±{score.score_se:.4f}",
    ]
    return _around([column.text(result.metrics[name]) for name, column in COLUMNS.items()], scored, COLUMNS)


def _around(cells: Sequence[str], scored: Sequence[str], columns: Mapping[str, Shown]) -> list[str]:
    """Return the cells of the metrics with those of the scores at their place among them."""
    before = sum(column.place < SCORE_COLUMN for column in columns.values())
    return [*cells[:before], *scored, *cells[before:]]


def outcome_table(outcome: dict[str, Any], base: dict[str, Any]) -> Table:
    """Return what `compress` will make next to the base model.

    Args:
        outcome: The values of a `search.by_hand.compress.Outcome`.
        base: The values of the base model's plan.
    """
    table = Table(box=None, pad_edge=False)
    for name in ("", "base", "result"):
        table.add_column(name, justify="left" if not name else "right")
    plan = outcome["plan"]
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"):
        table.add_row(key, str(base[key]), str(plan[key]), style="bold" if base[key] != plan[key] else "")
    table.add_row("precision", base["precision"], plan["precision"])
    table.add_row("parameters", short_count(outcome["base_parameters"]), short_count(outcome["parameters"]))
    table.add_row("MB", f"{outcome['base_bytes'] / 1e6:.1f}", f"{outcome['bytes'] / 1e6:.1f}")
    return table


def _pareto(trials: Sequence[TrialSummary], best: TrialSummary | None) -> Table:
    table = Table(title="Pareto front (★ the best Score)", title_justify="left", box=None, pad_edge=False)
    numbers = _around([one.title for one in FRONT.values()], ["PerfNorm", "SpeedNorm", "Score"], FRONT)
    for name in ("trial", "plan", *numbers):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for trial in trials:
        star = "★" if best is not None and trial.trial == best.trial else ""
        scored = [
            f"{trial.perf_norm:.3f}±{trial.perf_norm_se:.3f}",
            f"{trial.speed_norm:.3f}±{trial.speed_norm_se:.3f}",
            f"{trial.score:.4f}",
        ]
        table.add_row(
            f"{star}{trial.trial}",
            "" if trial.plan is None else short(trial.plan),
            *_around([column.text(trial.metrics.get(name)) for name, column in FRONT.items()], scored, FRONT),
        )
    return table


def _distilled(rows: Sequence[FinalistRow], best: BestOfAll) -> list[RenderableType]:
    """Return the table of the finalists, a line for each one that failed, and the best of all."""
    table = Table(title="Distilled (★ the best of all)", title_justify="left", box=None, pad_edge=False)
    for name in ("trial", "model", "PerfNorm", "SpeedNorm", "Score", "KL", "tokens", "s", ""):
        table.add_column(name, justify="left" if name in ("model", "") else "right", no_wrap=True)
    failed: list[RenderableType] = []
    for row in rows:
        if row.result is None:
            failed.append(Text(f"trial {row.trial}, {row.name}: {row.failure}: {row.reason}"))
            continue
        both = row.before, row.result.after
        table.add_row(
            f"{'★' if row.path == best.path else ''}{row.trial}",
            row.name,
            " → ".join(f"{one.perf_norm:.3f}" for one in both),
            " → ".join(f"{one.speed_norm:.3f}" for one in both),
            " → ".join(_with_se(one.score, one.score_se) for one in both),
            " → ".join(UNKNOWN if one.kl_nats_per_token is None else f"{one.kl_nats_per_token:.4f}" for one in both),
            f"{row.result.tokens:,}",
            f"{row.result.seconds:.0f}",
            "as before" if row.reused else "",
        )
    return [*([table] if table.row_count else []), *failed, Text(best_of_all_line(best))]


def _with_se(score: float | None, error: float | None) -> str:
    return f"{score:.4f}" + ("" if error is None else f"±{error:.4f}")


def _reasons(ended: Sequence[TrialSummary]) -> Table:
    table = Table(title="Pruned and failed", title_justify="left", box=None, pad_edge=False)
    table.add_column("trial", justify="right")
    table.add_column("plan", no_wrap=True)
    table.add_column("why")
    for trial in ended[-MOST_ENDED:]:
        plan = "" if trial.plan is None else short(trial.plan)
        table.add_row(str(trial.trial), plan, f"{trial.failure or trial.state.lower()}: {trial.reason or ''}")
    return table
