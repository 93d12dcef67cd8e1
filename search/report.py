"""Tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from search.progress import short


def status_table(state: dict[str, Any]) -> RenderableType:
    """A study's state (`search.status.of`): a line, the Pareto table, the reasons."""
    counts = ", ".join(
        f"{state[name]} {name}" for name in ("complete", "pruned", "failed", "running", "waiting") if state[name]
    )
    parts: list[RenderableType] = [
        Text(f"study {state['study']}: {state['finished']} of {state['trials']} trials finished ({counts})")
    ]
    baseline = state["baseline"]
    if baseline:
        parts.append(
            Text(
                f"baseline: perplexity {baseline['perplexity']:.3f}, {baseline['time_per_token_ms']:.2f} ms per token, "
                f"{baseline['model_size_mb']:.1f} MB ({baseline['backend']}, {baseline['device']})"
            )
        )
    if state["pareto"]:
        parts.append(_pareto(state))
    reasons = _reasons(state["ended"])
    if reasons.row_count:
        parts.append(reasons)
    return Group(*parts)


def _pareto(state: dict[str, Any]) -> Table:
    table = Table(title="Pareto front (★ the best Score)", title_justify="left", box=None, pad_edge=False)
    for name in ("trial", "plan", "perplexity", "PerfNorm", "SpeedNorm", "Score", "MB"):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for trial in state["pareto"]:
        star = "★" if trial["trial"] == state["best"]["trial"] else ""
        table.add_row(
            f"{star}{trial['trial']}",
            short(trial["plan"]),
            f"{trial['perplexity']:.3f}",
            f"{trial['perf_norm']:.3f}±{trial['perf_norm_se']:.3f}",
            f"{trial['speed_norm']:.3f}±{trial['speed_norm_se']:.3f}",
            f"{trial['score']:.4f}",
            f"{trial['model_size_mb']:.1f}",
        )
    return table


def _reasons(ended: list[dict[str, Any]], most: int = 12) -> Table:
    table = Table(title="Pruned and failed", title_justify="left", box=None, pad_edge=False)
    table.add_column("trial", justify="right")
    table.add_column("plan", no_wrap=True)
    table.add_column("why")
    for trial in ended[-most:]:
        plan = short(trial["plan"]) if "plan" in trial else ""
        table.add_row(
            str(trial["trial"]), plan, f"{trial.get('failure') or trial['state'].lower()}: {trial.get('reason', '')}"
        )
    return table
