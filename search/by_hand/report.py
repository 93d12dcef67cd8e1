"""Writes the report of one evaluated model and compares several, from their eval_result.json alone."""

from __future__ import annotations

import datetime
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from compressors import cached
from compressors.errors import CompressionError
from compressors.files import written_whole
from compressors.model import model_directory, structure
from evaluator.measure import UNTIMED_NOTE
from evaluator.measurement import METRICS, OF_ANSWERS, Measurement
from evaluator.metrics import UNKNOWN, Shown, shown
from evaluator.score import Formula, standard_error
from search import files, secrets
from search.by_hand import compress, report_answers, report_page, report_speeds
from search.by_hand.evaluation import RESULT, Evaluation
from search.config import references
from search.errors import UsageError
from search.setup import sources
from search.show import plots, verdict
from search.show.baseline_text import PREDICTED, noise_floor
from search.show.confirmed_row import ConfirmedRow
from search.show.rows import Row

SHARDS_SHOWN = 3  # shards of the text that are listed, those with the largest loss first


def evaluated(path: Path) -> Evaluation:
    """Return the evaluation next to a checkpoint's weights. Raises UsageError where there is none."""
    if not path.is_dir():
        raise UsageError(f"report: {path}: no such directory; name an evaluated model, such as submit/model")
    model_directory.files_of(path)
    try:
        return Evaluation.read_whole(path / RESULT)
    except FileNotFoundError:
        told = f"report: {path} holds no {RESULT}; run `optuna-search evaluate --model {shlex.quote(str(path))}` first"
    except cached.DAMAGE as error:
        told = f"report: {path / RESULT} is damaged ({cached.reason_of(error)}); run `optuna-search evaluate` again"
    raise UsageError(told)


def all_evaluated(models: Sequence[Path]) -> list[tuple[Path, Evaluation]]:
    """Return the evaluated models among `models` and in the directories directly below them.

    Raises:
        UsageError: There is none.
    """
    evaluations = []
    for place in models:
        for path in (place, *sorted(child for child in place.glob("*") if child.is_dir())):
            if (path / RESULT).exists():
                evaluations.append((path, evaluated(path)))
    if not evaluations:
        named = ", ".join(map(str, models))
        raise UsageError(f"report: no evaluated model in {named}; run `optuna-search evaluate --model PATH` first")
    return evaluations


def compared(evaluations: Sequence[tuple[Path, Evaluation]]) -> list[Row]:
    """Return the rows of the comparison: the first model's baseline, then the models.

    A model that can't be compared with the first one has a remark that says why.
    """
    first = evaluations[0][1]
    rows = [first.baseline_row()]
    return rows + [evaluation.row(path, remark=_remark(evaluation, first)) for path, evaluation in evaluations]


def _remark(evaluation: Evaluation, first: Evaluation) -> str | None:
    """Return what keeps an evaluation from being compared with the first one."""
    if evaluation.model.digest != first.model.digest:
        return f"another base model: {evaluation.model.source}"
    if evaluation.circumstances != first.circumstances:
        other = evaluation.circumstances
        differing = [key for key, value in first.circumstances.items() if other.get(key) != value]
        return f"measured with another {', '.join(differing) or 'setting'}: not comparable"
    if evaluation.formula != first.formula:
        return "scored by another formula: not comparable"
    return None


def weights(formula: Formula) -> tuple[float, float]:
    """Return the weights of PerfNorm and SpeedNorm in the Score."""
    return formula.weight_perf, formula.weight_speed


def write(
    evaluation: Evaluation, path: Path, name: str, description: str | None, outputs: Path, day: datetime.date
) -> Path:
    """Write the report, in Markdown and as a page for a browser, and its plots.

    Args:
        evaluation: The evaluation to report.
        path: The directory of the model.
        name: The name of the report.
        description: What was done, in words; None for the evaluation's own description.
        outputs: The directory in which DAY_NAME/ is made.
        day: The day in the names.

    Returns:
        The path of the report, outputs/DAY_NAME/DAY_report.md.
    """
    place = outputs / f"{day.isoformat()}_{name}"
    place.mkdir(parents=True, exist_ok=True)
    plots.plot_shards(evaluation.baseline.shard_nll, evaluation.measurement.shard_nll, place / "shards.png")
    plots.plot_scores([evaluation.row(path)], place / "scores.png", *weights(evaluation.formula))
    written = place / f"{day.isoformat()}_report.md"
    with written_whole(written) as scratch:
        markdown = text(evaluation, path, name, description, day, with_plots=True)
        scratch.write_text(markdown, encoding="utf-8")
    with written_whole(written.with_suffix(".html")) as scratch:
        scratch.write_text(report_page.page(markdown, name), encoding="utf-8")
    return written


def text(
    evaluation: Evaluation,
    path: Path,
    name: str,
    description: str | None,
    day: datetime.date,
    *,
    with_plots: bool = False,
) -> str:
    """Return the report in Markdown.

    Args:
        evaluation: The evaluation to report.
        path: The directory of the model.
        name: The name of the report.
        description: What was done, in words; None for the evaluation's own description.
        day: The day in the title.
        with_plots: Whether to show scores.png and shards.png, which lie next to the report.
    """
    parts = [
        f"# {name}, {day.isoformat()}",
        secrets.masked_places(description or evaluation.description or ""),
        "## Result",
        _results(evaluation),
        *([] if evaluation.confirmed is None else [verdict.of_confirmed(ConfirmedRow.from_dict(evaluation.confirmed))]),
        evaluation.of_goal,
        *(["![PerfNorm against SpeedNorm](scores.png)"] if with_plots else []),
        "## Score",
        _arithmetic(evaluation),
        "## What was changed",
        _changes(evaluation),
        "## Where the time comes from",
        _time(evaluation, path),
        *report_speeds.parts(evaluation),
        "## Where the loss comes from",
        _loss(evaluation),
        *(["![Loss of each shard](shards.png)"] if with_plots else []),
        *report_answers.parts(evaluation),
        "## Settings",
        _settings(evaluation, path),
        "## To reproduce it",
        _commands(evaluation, path, name),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(evaluation: Evaluation) -> str:
    m, b, score = evaluation.measurement, evaluation.baseline, evaluation.score
    rows = [
        *(
            [row.title, METRICS[name].base_text or _cell(row, b, name), _cell(row, m, name)]
            for name, row in shown(METRICS, "row").items()
            if name not in OF_ANSWERS or getattr(m, name) is not None
        ),
        *([f"accuracy, {task}", _task(b, task), _task(m, task)] for task in m.tasks),
        ["PerfNorm", "1", _pm(score.perf_norm, score.perf_norm_se)],
        ["SpeedNorm", "0", _pm(score.speed_norm, score.speed_norm_se)],
        ["**Score**", f"**{evaluation.formula.weight_perf:.4f}**", f"**{_pm(score.score, score.score_se)}**"],
    ]
    return _table(["", "baseline", "model"], rows) + (
        "\n\n± is a standard error. That of PerfNorm is computed over the shards of the text, paired with the "
        "baseline's; that of a time, over the turns that the model and the baseline took."
    )


def _cell(row: Shown, measured: Measurement, name: str) -> str:
    return PREDICTED if METRICS[name].timed and not measured.timed else row.text_of(measured, name)


def _arithmetic(evaluation: Evaluation) -> str:
    formula, score = evaluation.formula, evaluation.score
    difference, error = score.score - formula.weight_perf, score.score_se
    if abs(difference) <= 2 * error:
        verdict = "no difference was measured, as this is within twice the standard error"
    else:
        verdict = "the model is better than the baseline" if difference > 0 else "the model is worse than the baseline"
    m, b = evaluation.measurement, evaluation.baseline
    perf = f"PerfNorm = {b.perplexity:,.4f} / {m.perplexity:,.4f} = {score.perf_norm:.4f}"
    if [name for name, _ in formula.perf] != ["perplexity"]:
        named = ", ".join(f"{name} (weight {weight:g})" for name, weight in formula.perf)
        perf = f"PerfNorm = weighted mean of the ratios to the baseline of {named} = {score.perf_norm:.4f}"
    quality = _signed(formula.weight_perf * (score.perf_norm - 1), formula.weight_perf * score.perf_norm_se)
    speed = _signed(formula.weight_speed * score.speed_norm, formula.weight_speed * score.speed_norm_se)
    return "\n".join(
        [
            "```",
            perf,
            f"SpeedNorm = 1 − {m.time_ratio:.4f} = {score.speed_norm:.4f}     "
            f"({'' if m.timed else 'predicted '}time per token over the baseline's)",
            f"Score = max({formula.weight_perf:g} · {score.perf_norm:.4f} + "
            f"{formula.weight_speed:g} · {score.speed_norm:.4f}, 0) = {score.score:.4f}",
            "```",
            "",
            f"The baseline's Score is {formula.weight_perf:.4f}. The difference is {_signed(difference, error)}: "
            f"{verdict}. Quality contributes {quality} and speed {speed}.",
        ]
    )


def _changes(evaluation: Evaluation) -> str:
    if evaluation.plan is None:
        return "The model was not made by a plan of optuna-search; it was measured as it is."
    plan, base = evaluation.plan.to_dict(), evaluation.base_plan.to_dict()
    rows = [[key, str(base[key]), str(value)] for key, value in plan.items() if base[key] != value]
    return _table(["", "base model", "model"], rows) if rows else "Nothing: it is the base model."


def _time(evaluation: Evaluation, path: Path) -> str:
    m, b = evaluation.measurement, evaluation.baseline
    workload = m.workload
    runs = "" if workload.kind == "decode" else "runs of "
    what = f"{m.timing_samples} {runs}{report_speeds.workload_in_words(workload)}"
    timed = (
        f"A token takes {m.time_per_token_ms:.4f} ms, and {m.base_time_per_token_ms:.4f} ms with the baseline, which "
        f"was timed in turn with the model: the ratio is {m.time_ratio:.4f} ± {m.time_ratio_se:.4f} "
        f"({what}; {m.engine_version} on {m.device})."
    )
    predicted = (
        f"Nothing was timed. A token is predicted to take {m.time_ratio:.4f} of the baseline's time, from the weights "
        "that a decode step reads and from the number of layers."
    )
    floor = noise_floor(b) if m.timed else None
    lines = [
        timed if m.timed else predicted,
        *(f"- {note}" for note in (*m.notes, floor) if note and note != UNTIMED_NOTE),
    ]
    rows = _weights_by_part(evaluation, path)
    if rows is None:
        return "\n".join(lines)
    lines += [
        "",
        "Weights, in MB (a decode step at batch size 1 reads nearly all of them once):",
        "",
        _table(["part", "baseline", "model", "difference"], rows),
        "",
        f"The weights have {m.model_size_mb / b.model_size_mb:.3f} of the baseline's bytes and a token "
        f"{'takes' if m.timed else 'is predicted to take'} {m.time_ratio:.3f} of its time. Where these two differ, "
        "the rest is launches, work of the host, and kernels "
        "whose time is not proportional to their bytes.",
    ]
    return "\n".join(lines)


def _weights_by_part(evaluation: Evaluation, path: Path) -> list[list[str]] | None:
    """Return the rows of the weights' sizes, or None where one of the two models can't be read."""
    try:
        base, model = (structure.describe_any(place) for place in (_base_path(evaluation), path))
    except (CompressionError, OSError):
        return None
    base_bytes, model_bytes = ({part.name: part.bytes for part in one.parts} for one in (base, model))
    rows = []
    for name in dict.fromkeys([*base_bytes, *model_bytes]):
        before, after = (sizes.get(name, 0) / 1e6 for sizes in (base_bytes, model_bytes))
        if before or after:
            rows.append([name, f"{before:,.1f}", f"{after:,.1f}", f"{after - before:+,.1f}"])
    return rows


def _loss(evaluation: Evaluation) -> str:
    m, b = evaluation.measurement, evaluation.baseline
    lost = [after - before for before, after in zip(b.shard_nll, m.shard_nll, strict=True)]
    worst = sorted(range(len(lost)), key=lambda index: -lost[index])[:SHARDS_SHOWN]
    lines = [
        f"On {m.tokens:,} tokens the loss is {_pm(m.nll_nats_per_token, m.nll_nats_per_token_se)} nats per token; the "
        f"baseline's is {_pm(b.nll_nats_per_token, b.nll_nats_per_token_se)}. The difference, paired over the shards, "
        f"is {_signed(m.nll_nats_per_token - b.nll_nats_per_token, standard_error(lost))}. "
        f"The loss rises on {sum(value > 0 for value in lost)} of {len(lost)} shards, most of all on these:",
        "",
        _table(
            ["shard", "baseline", "model", "difference"],
            [[str(i), f"{b.shard_nll[i]:.4f}", f"{m.shard_nll[i]:.4f}", f"{lost[i]:+.4f}"] for i in worst],
        ),
    ]
    confirmed = evaluation.report_text
    if confirmed is not None:
        score = evaluation.score
        error = math.hypot(confirmed.perf_norm_se, score.perf_norm_se)
        lines += [
            "",
            f"On text that neither calibration nor search saw, the perplexity is {confirmed.perplexity:,.4f} and the "
            f"baseline's {confirmed.base_perplexity:,.4f}. PerfNorm is "
            f"{_pm(confirmed.perf_norm, confirmed.perf_norm_se)} there, which differs by "
            f"{_signed(confirmed.perf_norm - score.perf_norm, error)} from that on the search text.",
        ]
    return "\n".join(lines)


def _settings(evaluation: Evaluation, path: Path) -> str:
    m, model = evaluation.measurement, evaluation.model
    engine = f"{m.backend}: {m.engine_version}, torch {m.torch_version}, transformers {m.transformers_version}"
    workload, read = m.to_dict()["workload"], evaluation.settings.get("text", {})
    rows = [
        ["model", f"`{path}`"],
        ["base model", f"`{model.source}` ({model.digest[:12]})"],
        ["measured", evaluation.date],
        ["engine", engine],
        ["device", m.device],
        *([] if m.gpu is None else [["GPU during the timing", m.gpu.summary]]),
        ["workload", ", ".join(f"{key} {value}" for key, value in workload.items())],
        ["text", ", ".join(f"{key}: {value}" for key, value in read.items())],
        ["weights", f"sha256 {m.weights_sha256[:16]}…"],
    ]
    return _table(["", ""], rows)


def _commands(evaluation: Evaluation, path: Path, name: str) -> str:
    if evaluation.trial is not None:
        trial = ["--study-name", str(evaluation.study), "--trial", str(evaluation.trial)]
        return _code([["optuna-search", "export", *trial, "--to", str(path)]])
    words = secrets.masked_words(evaluation.words or ())
    words = [word for word in words if not word.startswith(("compression.", "description="))]
    evaluate = ["optuna-search", "evaluate", "--model", str(path), "--run-name", name, *words]
    changed = [] if evaluation.plan is None else compress.overrides_of(evaluation.plan, evaluation.base_plan)
    if not changed:  # it was not made by a plan, or it is the base model itself
        return _code([evaluate])
    return _code([["optuna-search", "compress", "--save-path", str(path), *words, *changed], evaluate])


def _base_path(evaluation: Evaluation) -> Path:
    source = references.restored(evaluation.model.source)
    if source != sources.EMBEDDED and not Path(source).is_dir():
        raise CompressionError(f"model {source}: is not here")  # a report downloads nothing
    return sources.resolve(source, files.CACHE)


def _code(commands: Sequence[Sequence[str]]) -> str:
    return "\n".join(["```", *(shlex.join(command) for command in commands), "```"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _pm(value: float, error: float) -> str:
    return f"{value:.4f} ± {error:.4f}"


def _signed(value: float, error: float) -> str:
    return f"{value:+.4f} ± {error:.4f}"


def _task(measured: Measurement, name: str) -> str:
    task = measured.tasks.get(name)
    return UNKNOWN if task is None else _pm(task.value, task.se)
