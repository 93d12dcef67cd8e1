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
from search.show import baseline_text, verdict
from search.show.rows import Result, Row, by_score
from search.show.study_state import BestOfAll, FinalistRow, Rung, StudyState, TrialSummary

COLUMNS = shown(METRICS, "column")
FRONT = shown(METRICS, "front")
FLAG = "!"  # behind a length that is flagged; a line below the table says why
MOST_ENDED = 12  # pruned and failed trials that are listed
NOISE_FLOOR = "the base model itself: noise floor"


def status_table(state: StudyState, *, everything: bool = False, option: str = "--all") -> RenderableType:
    """Return a study's state: a line, the baseline, the Pareto front, the reasons, the finalists, and a verdict.

    Args:
        state: The state of the study.
        everything: List all ended trials, and not only the last ones.
        option: What the user gives to see them all.
    """
    states = ("complete", "pruned", "failed", "stopped", "running", "waiting")
    counts = ", ".join(f"{getattr(state, name)} {name}" for name in states if getattr(state, name))
    more = (state.trials or 0) >= state.finished  # else a later call asked for fewer trials than there were
    done = f"{state.finished} of {state.trials}" if more else str(state.finished)
    parts: list[RenderableType] = [Text(f"study {state.study}: {done} trials finished ({counts})")]
    baseline = state.baseline
    if baseline is not None:
        parts.append(Text(f"baseline: {baseline_text.numbers(baseline)} ({baseline.backend}, {baseline.device})"))
        floor = baseline_text.noise_floor(baseline)
        parts += [] if floor is None else [Text(floor)]
    if not state.goal.is_default:
        best = state.best
        parts.append(Text(f"goal: {state.goal}"))
        parts += [] if best is None else [Text(f"best: trial {best.trial}, {best.result}")]
    if state.pareto:
        title = "the best Score" if state.goal.is_default else "the best trial"
        parts.append(_pareto(state.pareto, state.best, title))
        parts += _flags(state.pareto)
    if state.ended:
        shown_last = state.ended if everything else state.ended[-MOST_ENDED:]
        parts.append(_reasons(shown_last))
        if len(shown_last) < len(state.ended):
            parts.append(Text(f"… and {len(state.ended) - len(shown_last)} more ({option})"))
    if state.rungs:
        parts.append(_ladder(state.rungs))
    if state.confirmed:
        parts += _confirmed(state)
    if state.distilled and state.best_of_all is not None:
        parts += _distilled(state.distilled, state.best_of_all)
    parts += [Text(line) for line in (_noisy(state), verdict.of_study(state)) if line is not None]
    return Group(*parts)


def confirmed_table(state: StudyState) -> RenderableType:
    """Return the confirmed trials of a study, and the verdict on the best of them."""
    sentence = verdict.of_study(state)
    lines = [] if sentence is None else [Text(sentence)]
    return Group(*_confirmed(state), *lines)


def _ladder(rungs: Sequence[Rung]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("rung", "trials", "ended there", "time", "share", "Kendall's τ with the next rung"):
        table.add_column(name, justify="left" if name == "rung" else "right")
    for rung in rungs:
        kendall = "" if rung.kendall is None else f"{rung.kendall:.2f} ({rung.both} trials)"
        counts = (str(rung.trials), str(rung.ended), f"{rung.seconds:.0f} s", f"{rung.share:.0%}")
        table.add_row(rung.name, *counts, kendall)
    return table


def _noisy(state: StudyState) -> str | None:
    """Return a line about the models whose timing says little."""
    noisy = [one.name for one in state.contenders if (one.speed_norm_se or 0.0) > baseline_text.NOISY]
    if not noisy:
        return None
    return f"noisy timing: the standard error of SpeedNorm exceeds {baseline_text.NOISY:g} in {', '.join(noisy)}"


def best_of_all_line(best: BestOfAll) -> str:
    """Return the line that names the best of the trials and the distilled models."""
    what = f"trial {best.trial}" + (f" distilled, {best.path}" if best.path else ", as it was")
    return f"best of all: {what}, Score {_with_se(best.score, best.score_se)}"


def comparison(rows: Iterable[Row]) -> Table:
    """Return the table of evaluated models, the best Score first; those that failed come last with their reasons."""
    rows = by_score(rows)
    base = next((row.result.plan for row in rows if row.name == "baseline" and row.result is not None), None)
    table = Table(box=None, pad_edge=False)
    columns = _asked(COLUMNS, [row.result.metrics for row in rows if row.result is not None])
    numbers = _around([one.title for one in columns.values()], ["PerfNorm", "SpeedNorm", "Score"], columns)
    for name in ("experiment", *numbers, "remark"):
        table.add_column(name, justify="left" if name in ("experiment", "remark") else "right")
    for row in rows:
        if row.result is None:
            table.add_row(Text(row.name), *[""] * len(numbers), Text(f"{row.failure}: {row.reason}"))
            continue
        itself = base is not None and row.result.plan == base and row.name != "baseline"
        remarks = [row.remark, NOISE_FLOOR if itself else None, "measured before" if row.before else None]
        table.add_row(
            Text(row.name), *cells(row.result, columns), Text(next((remark for remark in remarks if remark), ""))
        )
    return table


def _asked(columns: Mapping[str, Shown], rows: Iterable[Mapping[str, float | None]]) -> dict[str, Shown]:
    """Return the columns without optional ones that no row has."""
    known = {name for metrics in rows for name, value in metrics.items() if value is not None}
    return {name: one for name, one in columns.items() if name in known or not METRICS[name].optional}


def cells(result: Result, columns: Mapping[str, Shown] = COLUMNS) -> list[str]:
    """Return the cells of a row of the comparison in these columns, without its name and its remark."""
    score = result.score
    scored = [
        f"{score.perf_norm:.3f}±{score.perf_norm_se:.3f}",
        f"{score.speed_norm:.3f}±{score.speed_norm_se:.3f}",
        f"{score.score:.4f}±{score.score_se:.4f}",
    ]
    metrics = [
        column.text(result.metrics.get(name)) if result.timed or not METRICS[name].timed else baseline_text.PREDICTED
        for name, column in columns.items()
    ]
    return _around(metrics, scored, columns)


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


def _pareto(trials: Sequence[TrialSummary], best: TrialSummary | None, title: str) -> Table:
    table = Table(title=f"Pareto front (★ {title})", title_justify="left", box=None, pad_edge=False)
    columns = _asked(FRONT, [trial.metrics for trial in trials])
    numbers = _around([one.title for one in columns.values()], ["PerfNorm", "SpeedNorm", "Score"], columns)
    for name in ("trial", "plan", *numbers):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for trial in trials:
        star = "★" if best is not None and trial.trial == best.trial else ""
        scored = [
            f"{trial.perf_norm:.3f}±{trial.perf_norm_se:.3f}",
            f"{trial.speed_norm:.3f}±{trial.speed_norm_se:.3f}",
            _with_se(trial.score, trial.score_se),
        ]
        plan = "" if trial.plan is None else short(trial.plan)
        table.add_row(
            f"{star}{trial.trial}",
            f"{plan} (the base model)" if trial.is_base else plan,
            *_around([_front_cell(trial, name, column) for name, column in columns.items()], scored, columns),
        )
    return table


def _front_cell(trial: TrialSummary, name: str, column: Shown) -> str:
    flagged = name == "length_ratio" and trial.length_flag is not None
    return column.text(trial.metrics.get(name)) + (FLAG if flagged else "")


def _flags(trials: Iterable[TrialSummary]) -> list[RenderableType]:
    """Return a line for each trial whose answers are too long or too short."""
    return [Text(f"trial {one.trial}: {one.length_flag}") for one in trials if one.length_flag is not None]


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
        if row.result.length_flag is not None:
            failed.append(Text(f"trial {row.trial}, {row.name}: {row.result.length_flag}"))
    return [*([table] if table.row_count else []), *failed, Text(best_of_all_line(best))]


def _confirmed(state: StudyState) -> list[RenderableType]:
    """Return the table of the confirmed trials, and a line for each that failed and for each remark."""
    rows, best = state.confirmed, state.confirmed_best
    texts = sorted({row.text for row in rows if row.text is not None})
    star = "the best trial" if any(row.of_goal is not None for row in rows) else "the best Score"
    subject = "the goal's bounds" if any(row.bounds_says is not None for row in rows) else "the Score"
    table = Table(
        title=f"Confirmed on the {' and '.join(texts)} (★ {star}; verdicts on {subject}, with 95% intervals)",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("trial", "plan", "pairs", "perplexity", "PerfNorm", "SpeedNorm", "Score", "verdict", "speed"):
        left = name in ("plan", "verdict", "speed")
        table.add_column(name, justify="left" if left else "right", no_wrap=not left)
    lines: list[RenderableType] = []
    for row in rows:
        if row.score is None:
            lines.append(Text(f"trial {row.trial} could not be confirmed: {row.failure}: {row.reason}"))
            continue
        table.add_row(
            f"{'★' if best is not None and row.trial == best.trial else ''}{row.trial}",
            Text(short(row.plan)),
            f"{row.pairs}" if row.pairs else "not timed",
            f"{row.perplexity:.3f}",
            f"{row.perf_norm:.3f}±{row.perf_norm_se:.3f}",
            f"{row.speed_norm:.3f}±{row.speed_norm_se:.3f}",
            _with_se(row.score, row.score_se),
            Text(row.bounds_says or row.says or ""),
            Text((row.speed_says if row.speed_verdict == "UNDECIDED" else row.speed_verdict) or ""),
        )
        remarks = row.notes if row.of_goal is None else (row.of_goal, *row.notes)
        lines += [Text(f"trial {row.trial}: {remark}") for remark in remarks]
    if table.row_count and best is None and state.confirmed_miss is None:
        lines.append(
            Text("no confirmed trial stands for the best: `optuna-search confirm` confirms what is measured since")
        )
    return [*([table] if table.row_count else []), *lines]


def _with_se(score: float | None, error: float | None) -> str:
    return f"{score:.4f}" + ("" if error is None else f"±{error:.4f}")


def _reasons(ended: Sequence[TrialSummary]) -> Table:
    """Return a line for each trial; what is wider than the terminal is cut off, and stays in the JSON."""
    table = Table(title="Pruned and failed", title_justify="left", box=None, pad_edge=False)
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("plan")
    table.add_column("why")
    for trial in ended:
        kind = trial.failure or ("failed" if trial.state == "FAIL" else None)
        why = ": ".join(part for part in (kind, trial.reason) if part) or trial.state.lower()
        cells = ("" if trial.plan is None else short(trial.plan), " ".join(why.split()))
        table.add_row(str(trial.trial), *(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells))
    return table
