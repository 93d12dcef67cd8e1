"""The Markdown report of one evaluated model, or of several, out of their eval_result.json alone. Measures nothing."""

from __future__ import annotations

import datetime
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.errors import CompressionError
from compressors.model import structure
from search import files
from search.by_hand import evaluate as evaluation
from search.by_hand import multirun
from search.errors import UsageError
from search.setup import sources
from search.show import plots, tables

SHARDS_SHOWN = 3  # of the text, those that lose most


def evaluated(path: Path) -> dict[str, Any]:
    """The evaluation beside a checkpoint's weights. Raises UsageError where there is none."""
    found = files.read_json(path / evaluation.RESULT)
    if not path.is_dir():
        raise UsageError(f"report: {path}: no such directory; name an evaluated model, such as submit/model")
    if found is None or "formula" not in found:
        raise UsageError(
            f"report: {path} holds no {evaluation.RESULT}; run `optuna-search evaluate --model {path}` first"
        )
    return found


def all_evaluated(models: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Those of `models` that were evaluated; of a directory that is no model, the models in it."""
    found = []
    for place in models:
        for path in (place, *sorted(child for child in place.glob("*") if child.is_dir())):
            if (path / evaluation.RESULT).is_file():
                found.append((path, evaluated(path)))
    if not found:
        named = ", ".join(map(str, models))
        raise UsageError(f"report: no evaluated model in {named}; run `optuna-search evaluate --model PATH` first")
    return found


def compared(found: Sequence[tuple[Path, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the comparison, a row for each baseline too; one of other circumstances than the first says so."""
    first = found[0][1]
    rows = [multirun.baseline_row(first)]
    for path, one in found:
        row = multirun.row(one, path)
        if one["model"]["digest"] != first["model"]["digest"]:
            row["remark"] = f"another base model: {one['model']['source']}"
        elif one["circumstances"] != first["circumstances"]:
            differing = [key for key, value in first["circumstances"].items() if one["circumstances"].get(key) != value]
            row["remark"] = f"measured with another {', '.join(differing) or 'setting'}: not comparable"
        elif one["formula"] != first["formula"]:
            row["remark"] = "scored by another formula: not comparable"
        rows.append(row)
    return rows


def weights(found: Mapping[str, Any]) -> dict[str, float]:
    return {key: found["formula"][key] for key in ("weight_perf", "weight_speed")}


def comparison(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, the best Score first."""
    return _table([*tables.COMPARED], [[*tables.cells(row), row.get("remark") or ""] for row in tables.by_score(rows)])


def write(
    found: dict[str, Any], path: Path, name: str, description: str | None, outputs: Path, day: datetime.date
) -> Path:
    """outputs/DAY_NAME/DAY_report.md with its plots beside it. Returns its path."""
    place = outputs / f"{day.isoformat()}_{name}"
    place.mkdir(parents=True, exist_ok=True)
    plots.plot_shards(found["baseline"]["shard_nll"], found["measurement"]["shard_nll"], place / "shards.png")
    plots.plot_scores([multirun.row(found, path)], place / "scores.png", **weights(found))
    written = place / f"{day.isoformat()}_report.md"
    scratch = written.with_name(f".{written.name}")
    scratch.write_text(text(found, path, name, description, day, with_plots=True), encoding="utf-8")
    scratch.replace(written)
    return written


def text(
    found: dict[str, Any],
    path: Path,
    name: str,
    description: str | None,
    day: datetime.date,
    *,
    with_plots: bool = False,
) -> str:
    parts = [
        f"# {name}, {day.isoformat()}",
        description or found.get("description") or "",
        "## Result",
        _results(found),
        *(["![PerfNorm against SpeedNorm](scores.png)"] if with_plots else []),
        "## Score",
        _arithmetic(found),
        "## What was changed",
        _changes(found),
        "## Where the time comes from",
        _time(found, path),
        "## Where the loss comes from",
        _loss(found),
        *(["![Loss of each shard](shards.png)"] if with_plots else []),
        "## Settings",
        _settings(found, path),
        "## To reproduce it",
        _commands(found, path, name),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(found: Mapping[str, Any]) -> str:
    m, b = found["measurement"], found["baseline"]
    rows = [
        ["parameters", tables.parameters(b["total_parameters"]), tables.parameters(m["total_parameters"])],
        ["model_size_mb", f"{b['model_size_mb']:.1f}", f"{m['model_size_mb']:.1f}"],
        ["perplexity", f"{b['perplexity']:,.4f}", f"{m['perplexity']:,.4f}"],
        ["time_per_token_ms", _pm(b, "time_per_token_ms", 4), _pm(m, "time_per_token_ms", 4)],
        ["tokens_per_sec", f"{b['tokens_per_sec']:,.1f}", f"{m['tokens_per_sec']:,.1f}"],
        ["KL to the base, nats per token", "0", _number(m["kl_nats_per_token"], 5)],
        ["top-1 agreement with the base", "1", _number(m["top1_agreement"], 4)],
        *([f"accuracy, {task}", _task(b, task), _task(m, task)] for task in m.get("tasks") or {}),
        ["PerfNorm", "1", _pm(found, "perf_norm", 4)],
        ["SpeedNorm", "0", _pm(found, "speed_norm", 4)],
        ["**Score**", f"**{found['formula']['weight_perf']:.4f}**", f"**{_pm(found, 'score', 4)}**"],
    ]
    return _table(["", "baseline", "model"], rows) + (
        "\n\n± is a standard error: of PerfNorm over the shards of the text, paired with the "
        "baseline's; of times over the "
        "turns that candidate and baseline took."
    )


def _arithmetic(found: Mapping[str, Any]) -> str:
    formula, base = found["formula"], found["formula"]["weight_perf"]
    of_perf, of_speed = formula["weight_perf"], formula["weight_speed"]
    difference, error = found["score"] - base, found["score_se"]
    if abs(difference) <= 2 * error:
        verdict = "within twice its standard error: no difference that was measured"
    else:
        verdict = "better than the baseline" if difference > 0 else "worse than the baseline"
    m, b = found["measurement"], found["baseline"]
    perf = f"PerfNorm = {b['perplexity']:,.4f} / {m['perplexity']:,.4f} = {found['perf_norm']:.4f}"
    if [name for name, _ in formula["perf"]] != ["perplexity"]:
        named = ", ".join(f"{name} (weight {weight:g})" for name, weight in formula["perf"])
        perf = f"PerfNorm = weighted mean of the ratios to the baseline of {named} = {found['perf_norm']:.4f}"
    return "\n".join(
        [
            "```",
            perf,
            f"SpeedNorm = 1 − {m['time_ratio']:.4f} = {found['speed_norm']:.4f}     (time per token "
            "over the baseline's)",
            f"Score = max({of_perf:g} · {found['perf_norm']:.4f} + {of_speed:g} · {found['speed_norm']:.4f}, 0) = "
            f"{found['score']:.4f}",
            "```",
            "",
            f"Against the baseline's {base:.4f}: {difference:+.4f} ± {error:.4f}, {verdict}. Of it "
            f"{of_perf * (found['perf_norm'] - 1):+.4f} ± {of_perf * found['perf_norm_se']:.4f} is quality and "
            f"{of_speed * found['speed_norm']:+.4f} ± {of_speed * found['speed_norm_se']:.4f} speed.",
        ]
    )


def _changes(found: Mapping[str, Any]) -> str:
    plan, base = found["plan"], found["base_plan"]
    if plan is None:
        return "Not made by a plan of optuna-search; it was measured as it is."
    rows = [[key, str(base[key]), str(value)] for key, value in plan.items() if base[key] != value]
    return _table(["", "base model", "model"], rows) if rows else "Nothing: it is the base model."


def _time(found: Mapping[str, Any], path: Path) -> str:
    m, b = found["measurement"], found["baseline"]
    lines = [
        f"Time per token {m['time_per_token_ms']:.4f} ms against {m['base_time_per_token_ms']:.4f} "
        "ms, timed in turn: ratio "
        f"{m['time_ratio']:.4f} ± {m['time_ratio_se']:.4f} ({m['timing_samples']} decode steps, batch sizes "
        f"{', '.join(map(str, m['workload']['batch_sizes']))}; {m['engine_version']} on {m['device']}).",
        *(f"- {note}" for note in m["notes"]),
    ]
    try:
        parts = [structure.describe_any(place) for place in (_base_path(found), path)]
    except (CompressionError, OSError):
        return "\n".join(lines)
    names = [part.name for part in parts[0].parts]
    bytes_of = [{part.name: part.bytes for part in one.parts} for one in parts]
    rows = []
    for name in dict.fromkeys([*names, *bytes_of[1]]):
        before, after = (one.get(name, 0) / 1e6 for one in bytes_of)
        if before or after:
            rows.append([name, f"{before:,.1f}", f"{after:,.1f}", f"{after - before:+,.1f}"])
    ratio = m["model_size_mb"] / b["model_size_mb"]
    lines += [
        "",
        "Weights, in MB (a decode step at batch 1 reads nearly all of them once):",
        "",
        _table(["part", "baseline", "model", "difference"], rows),
        "",
        f"The file has {ratio:.3f} of the baseline's bytes and a token takes {m['time_ratio']:.3f} of "
        "its time: what the "
        "two differ by is launches, the host, and kernels that cost other than their bytes.",
    ]
    return "\n".join(lines)


def _loss(found: Mapping[str, Any]) -> str:
    m, b = found["measurement"], found["baseline"]
    lost = [after - before for before, after in zip(b["shard_nll"], m["shard_nll"], strict=True)]
    worst = sorted(range(len(lost)), key=lambda index: -lost[index])[:SHARDS_SHOWN]
    lines = [
        f"On {m['tokens']:,} tokens the loss is {m['nll_nats_per_token']:.4f} nats per token against "
        f"{b['nll_nats_per_token']:.4f}: {m['nll_nats_per_token'] - b['nll_nats_per_token']:+.4f}. "
        f"{sum(value > 0 for value in lost)} of {len(lost)} shards lose; those that lose most:",
        "",
        _table(
            ["shard", "baseline", "model", "difference"],
            [[str(i), f"{b['shard_nll'][i]:.4f}", f"{m['shard_nll'][i]:.4f}", f"{lost[i]:+.4f}"] for i in worst],
        ),
    ]
    confirmed = found["report_text"]
    if confirmed:
        gap = confirmed["perf_norm"] - found["perf_norm"]
        error = math.hypot(confirmed["perf_norm_se"], found["perf_norm_se"])
        lines += [
            "",
            f"On text that neither calibration nor search saw: perplexity {confirmed['perplexity']:,.4f} against "
            f"{confirmed['base_perplexity']:,.4f}, PerfNorm {confirmed['perf_norm']:.4f} ± "
            f"{confirmed['perf_norm_se']:.4f} ({gap:+.4f} ± {error:.4f} to that of the search text).",
        ]
    return "\n".join(lines)


def _settings(found: Mapping[str, Any], path: Path) -> str:
    m, section = found["measurement"], found["settings"]
    rows = [
        ["model", f"`{path}`"],
        ["base model", f"`{found['model']['source']}` ({found['model']['digest'][:12]})"],
        ["measured", found["date"]],
        [
            "engine",
            f"{m['backend']}: {m['engine_version']}, torch {m['torch_version']}, transformers "
            f"{m['transformers_version']}",
        ],
        ["device", m["device"]],
        ["workload", ", ".join(f"{key} {value}" for key, value in m["workload"].items())],
        ["text", ", ".join(f"{key}: {value}" for key, value in section["text"].items())],
        ["weights", f"sha256 {m['weights_sha256'][:16]}…"],
    ]
    return _table(["", ""], rows)


def _commands(found: Mapping[str, Any], path: Path, name: str) -> str:
    if "trial" in found:
        trial = ["--study-name", found["study"], "--trial", str(found["trial"])]
        return _code([["optuna-search", "export", *trial, "--to", str(path)]])
    words = [word for word in found.get("words", ()) if not word.startswith(("compression.", "description="))]
    evaluate = ["optuna-search", "evaluate", "--model", str(path), "--run-name", name, *words]
    if found["plan"] is None:
        return _code([evaluate])
    return _code([["optuna-search", "compress", "--save-path", str(path), *words, *_changed_keys(found)], evaluate])


def _changed_keys(found: Mapping[str, Any]) -> list[str]:
    plan, base = found["plan"], found["base_plan"]
    if plan is None:
        return []
    keys = {
        "num_hidden_layers": "keep_layers",
        "num_attention_heads": "keep_heads",
        "num_key_value_heads": "keep_kv_heads",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
    }
    words = [f"compression.{key}={plan[name]}" for name, key in keys.items() if plan[name] != base[name]]
    if plan["num_hidden_layers"] != base["num_hidden_layers"]:
        listed = plan["drop_from"][:1].isdigit()
        words.append(f"compression.drop_from={'[' + plan['drop_from'] + ']' if listed else plan['drop_from']}")
    if plan["precision"] != base["precision"]:
        words.append(f"compression.{'dtype' if 'float' in plan['precision'] else 'scheme'}={plan['precision']}")
    return words


def _base_path(found: Mapping[str, Any]) -> Path:
    source = found["model"]["source"]
    if source != sources.EMBEDDED and not Path(source).is_dir():
        raise CompressionError(f"model {source}: is not here")  # a report fetches nothing
    return sources.resolve(source, files.CACHE)


def _code(commands: Sequence[Sequence[str]]) -> str:
    return "\n".join(["```", *(shlex.join(command) for command in commands), "```"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _pm(values: Mapping[str, Any], key: str, digits: int) -> str:
    return f"{values[key]:.{digits}f} ± {values[key + '_se']:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _task(measured: Mapping[str, Any], name: str) -> str:
    task = (measured.get("tasks") or {}).get(name)
    return "–" if task is None else f"{task['value']:.4f} ± {task['se']:.4f}"
