"""Tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from search.show.progress import short


def status_table(state: dict[str, Any]) -> RenderableType:
    """A study's state (`search.status.of`): a line, the Pareto table, the reasons."""
    counts = ", ".join(
        f"{state[name]} {name}" for name in ("complete", "pruned", "failed", "running", "waiting") if state[name]
    )
    more = (state["trials"] or 0) >= state["finished"]  # else a later call asked for fewer than there were
    done = f"{state['finished']} of {state['trials']}" if more else str(state["finished"])
    parts: list[RenderableType] = [Text(f"study {state['study']}: {done} trials finished ({counts})")]
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
    if state["distilled"]:
        distilled = _distilled(state["distilled"], state["best_of_all"])
        if distilled.row_count:
            parts.append(distilled)
        for row in state["distilled"]:
            if "after" not in row:
                parts.append(Text(f"trial {row['trial']}, {row['name']}: {row['failure']}: {row['reason']}"))
        parts.append(Text(best_of_all(state["best_of_all"])))
    return Group(*parts)


def best_of_all(best: dict[str, Any]) -> str:
    """`search.status.best_of_all` in a line."""
    what = f"trial {best['trial']}" + (f" distilled, {best['path']}" if best["path"] else ", as it was")
    return f"best of all: {what}, Score {_with_se(best['score'], best['score_se'])}"


def comparison(rows: list[dict[str, Any]]) -> Table:
    """Evaluated models (`search.jobs.row`), the best Score first; those that failed last, with their reasons."""
    table = Table(box=None, pad_edge=False)
    for name in COMPARED:
        table.add_column(name, justify="left" if name in ("experiment", "remark") else "right")
    for row in by_score(rows):
        if "failure" in row:
            table.add_row(row["name"], *[""] * 8, f"{row['failure']}: {row['reason']}")
            continue
        table.add_row(*cells(row), row.get("remark") or ("measured before" if row.get("before") else ""))
    return table


COMPARED = ("experiment", "params", "perplexity", "KL", "ms/token", "PerfNorm", "SpeedNorm", "Score", "MB", "remark")


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row of the comparison, but its remark."""
    kl = row.get("kl_nats_per_token")
    return [
        row["name"],
        parameters(row["total_parameters"]),
        f"{row['perplexity']:,.3f}",
        "–" if kl is None else f"{kl:.4f}",
        f"{row['time_per_token_ms']:.3f}",
        f"{row['perf_norm']:.3f}±{row['perf_norm_se']:.3f}",
        f"{row['speed_norm']:.3f}±{row['speed_norm_se']:.3f}",
        f"{row['score']:.4f}±{row['score_se']:.4f}",
        f"{row['model_size_mb']:.1f}",
    ]


def by_score(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row.get("score", -1.0))


def parameters(count: int) -> str:
    """1.28B, 134.5M."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def outcome_table(outcome: dict[str, Any], base: dict[str, Any]) -> Table:
    """What `compress` will make (`search.compress.Outcome`, as a dict), beside the base model's plan."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "base", "result"):
        table.add_column(name, justify="left" if not name else "right")
    plan = outcome["plan"]
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"):
        table.add_row(key, str(base[key]), str(plan[key]), style="bold" if base[key] != plan[key] else "")
    table.add_row("precision", base["precision"], plan["precision"])
    table.add_row("parameters", parameters(outcome["base_parameters"]), parameters(outcome["parameters"]))
    table.add_row("MB", f"{outcome['base_bytes'] / 1e6:.1f}", f"{outcome['bytes'] / 1e6:.1f}")
    return table


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


def _distilled(rows: list[dict[str, Any]], best: dict[str, Any]) -> Table:
    """A line a finalist: before and after its distillation."""
    table = Table(title="Distilled (★ the best of all)", title_justify="left", box=None, pad_edge=False)
    for name in ("trial", "model", "PerfNorm", "SpeedNorm", "Score", "KL", "tokens", "s", ""):
        table.add_column(name, justify="left" if name in ("model", "") else "right", no_wrap=True)
    for row in rows:
        if "after" not in row:
            continue
        both = row["before"], row["after"]
        table.add_row(
            f"{'★' if row['path'] == best['path'] else ''}{row['trial']}",
            row["name"],
            *(" → ".join(f"{one[key]:.3f}" for one in both) for key in ("perf_norm", "speed_norm")),
            " → ".join(_with_se(one["score"], one["score_se"]) for one in both),
            " → ".join("–" if (kl := one["kl_nats_per_token"]) is None else f"{kl:.4f}" for one in both),
            f"{row['tokens']:,}",
            f"{row['seconds']:.0f}",
            "as before" if row.get("reused") else "",
        )
    return table


def _with_se(score: float, error: float | None) -> str:
    return f"{score:.4f}" + ("" if error is None else f"±{error:.4f}")


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
