"""Defines the commands by hand: baseline, evaluate, analyze, report, package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from search.cli.main import main
from search.cli.options import (
    PATH,
    TEXT,
    StudyCommand,
    is_asked,
    json_option,
    load_file,
    print_table,
    study_options,
    study_words,
)


@main.command("baseline", cls=StudyCommand, groups=("model", "evaluation", "tracking"))
@study_options
@click.option("--model", type=PATH, help="Base model [default: the study file's].")
@click.option("--again", is_flag=True, help="Measure it again although its measurement is known.")
@json_option("Print the measurement as JSON [default: a line].")
def baseline_command(model: Path | None, again: bool, as_json: bool, **where: Any) -> None:
    """Measure the base model → outputs/baseline_result.json and an MLflow run tagged `baseline`.

    \b
    optuna-search baseline
    optuna-search baseline --model /models/my-llama --again
    """
    file = load_file(**where, model__source=model)

    from search.by_hand import multirun
    from search.setup import setting
    from search.show import baseline_text, progress
    from search.stages.baseline import BASELINE_RESULT
    from search.stages.bench import Bench

    with progress.Live(1) as live, Bench.of(setting.prepare(file, live.say, search=False, warn=live.warn)) as bench:
        measured = multirun.baseline(bench, live.say, live.warn, again=again)
        place = bench.setting.outputs / BASELINE_RESULT
    if as_json:
        click.echo(json.dumps(measured.to_dict()))
        return
    click.echo(
        f"baseline {file.source_shown}: {baseline_text.numbers(measured, decimals=3, rate=True)} "
        f"({measured.backend}, {measured.device}) → {place}"
    )
    floor = baseline_text.noise_floor(measured)
    if floor is not None:
        click.echo(floor)


@main.command("evaluate", cls=StudyCommand, groups=("model", "evaluation", "tracking"))
@study_options
@click.option(
    "--model",
    "path",
    type=PATH,
    default=Path("submit/model"),
    show_default=True,
    help="Candidate: the checkpoint to measure. The base model that it is compared with is model.source.",
)
@click.option("--run-name", type=TEXT, help="Name of the MLflow run [default: the directory's name].")
@click.option("--baseline", "only_baseline", is_flag=True, help="Measure the base model alone, as `baseline` does.")
@json_option("Print the evaluation as JSON [default: a table].")
@click.pass_context
def evaluate_command(
    context: click.Context, /, path: Path, run_name: str | None, only_baseline: bool, as_json: bool, **where: Any
) -> None:
    """Measure any checkpoint against the baseline → PATH/eval_result.json and an MLflow run.

    --model is the candidate. The base model is the study file's; model.source=PATH sets another.

    \b
    optuna-search evaluate --model submit/model_drop28 --run-name drop28
    optuna-search evaluate --model submit/model_drop28 model.source=/models/my-llama
    """
    if only_baseline:
        _refuse_candidate(context)
        context.invoke(baseline_command, model=None, again=False, as_json=as_json, **where)
        return
    file = load_file(**where)

    from search.by_hand import multirun
    from search.setup import setting
    from search.show import progress, served_table, tables
    from search.stages.bench import Bench

    with progress.Live(1) as live, Bench.of(setting.prepare(file, live.say, search=False, warn=live.warn)) as bench:
        result = multirun.evaluate(
            bench, path, run_name or path.resolve().name, live.say, live.warn, study_words(**where)
        )
    if as_json:
        click.echo(json.dumps(result.to_dict()))
        return
    print_table(tables.comparison([result.baseline_row(), result.row(path)]))
    if result.measurement.served:
        print_table(served_table.render(result.measurement, result.baseline))
    click.echo(f"→ {path}/eval_result.json")


def _refuse_candidate(context: click.Context) -> None:
    """Refuse options of `evaluate` that are a candidate's, as none is measured."""
    from search.errors import UsageError

    for name, option in (("path", "--model"), ("run_name", "--run-name")):
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise UsageError(
                f"evaluate --baseline {option} {context.params[name]}: --baseline measures the base model alone, and "
                f"{option} is of a candidate; leave out one of them (model.source=PATH sets another base model)"
            )


@main.command("analyze", cls=StudyCommand, groups=("model",))
@study_options
@click.option("--model", type=PATH, help="Model to look at [default: the study file's].")
@click.option("--plot", type=PATH, help="File to draw it into, .png or .html [default: none].")
@click.option(
    "--importance",
    is_flag=True,
    help="Measure the layers' importance on the calibration text where it is not known yet.",
)
@json_option()
def analyze_command(model: Path | None, plot: Path | None, importance: bool, as_json: bool, **where: Any) -> None:
    """Show the structure of a model: parameters and bytes by part, heads, what each cut would save.

    \b
    optuna-search analyze
    optuna-search analyze --model submit/model_drop28 --plot structure.png
    """
    file = load_file(**where, model__source=model)

    from search.by_hand import multirun
    from search.show import plots, progress, structure

    if plot is not None:
        plots.require_suffix(plot)
    with progress.Live(1) as live:
        analysis = multirun.analyze(file, live.say, importance=importance)
    if plot is not None:
        plots.plot_structure(analysis, plot)
    if as_json:
        click.echo(json.dumps(analysis.to_dict()))
        return
    print_table(structure.render(analysis))
    if plot is not None:
        click.echo(f"→ {plot}")


@main.command("report")
@click.option(
    "-e", "--experiment", type=TEXT, help="Name of the report: outputs/DATE_NAME/DATE_report.md [default: a table]."
)
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    type=PATH,
    help="Evaluated model, or a directory of some; may be repeated [default: submit].",
)
@click.option("-d", "--description", help="What was done, in words [default: the evaluation's].")
@click.option("--print-only", is_flag=True, help="Print the report and write nothing.")
@click.option(
    "--outputs", type=PATH, default=Path("outputs"), show_default=True, help="Directory that reports are written to."
)
@click.option(
    "--plot",
    type=PATH,
    help="File to draw a comparison into, PerfNorm against SpeedNorm, .png or .html [default: none].",
)
@json_option()
def report_command(
    experiment: str | None,
    models: tuple[Path, ...],
    description: str | None,
    print_only: bool,
    outputs: Path,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Report one evaluated model in Markdown (-e NAME -m PATH), or all of them in one table, the best Score first.

    \b
    optuna-search report
    optuna-search report -e drop28 -m submit/model_drop28 -d "two layers removed"
    """
    import datetime

    from search import errors
    from search.by_hand import report
    from search.show import plots, tables

    if experiment is None and (print_only or description is not None):
        option = "--print-only" if print_only else "--description"
        raise errors.UsageError(
            f"report {option}: is of one model's report, and without --experiment all models are compared in a table; "
            f"add -e NAME, or leave out {option}"
        )
    if experiment is not None and plot is not None:
        raise errors.UsageError(
            f"report -e {experiment} --plot {plot}: --plot compares models, and a report has its own plots; leave out "
            "-e or --plot"
        )
    if print_only and as_json:
        raise errors.UsageError(
            f"report -e {experiment}: --print-only prints Markdown and --json prints JSON; leave out one of them"
        )
    if experiment is None:
        if plot is not None:
            plots.require_suffix(plot)
        evaluated = report.all_evaluated(models or (Path("submit"),))
        rows = report.compared(evaluated)
        if plot is not None:
            plots.plot_scores(rows[1:], plot, *report.weights(evaluated[0][1].formula))
        if as_json:
            click.echo(json.dumps([row.to_dict() for row in rows]))
        else:
            print_table(tables.comparison(rows))
        return
    if len(models) > 1:
        raise errors.UsageError(
            f"report -e {experiment}: reports one model, and {len(models)} were named with -m; name one"
        )
    path = models[0] if models else Path("submit/model")
    one, today = report.evaluated(path), datetime.date.today()
    if print_only:
        click.echo(report.text(one, path, experiment, description, today), nl=False)
        return
    written = report.write(one, path, experiment, description, outputs, today)
    click.echo(json.dumps({"report": str(written)}) if as_json else f"→ {written}")


@main.command("package", cls=StudyCommand, groups=())
@study_options
@click.option("--model", "path", type=PATH, default=Path("submit/model"), show_default=True, help="Checkpoint to pack.")
@click.option("--out", type=PATH, default=Path("submit.zip"), show_default=True, help="Zip file to write.")
@click.option(
    "--for-transformers",
    type=TEXT,
    help="Version of transformers that is to read it [default: what it was written for, else the study file's].",
)
@click.option("--check-only", is_flag=True, help="Check the list and write nothing.")
@json_option("Print JSON to standard output [default: a line for each rule].")
def package_command(
    path: Path, out: Path, for_transformers: str | None, check_only: bool, as_json: bool, **where: Any
) -> None:
    """Check the submission list and write submit.zip with model/… at its root.

    \b
    optuna-search package
    optuna-search package --model submit/model_drop28 --check-only
    """
    file = load_file(**where, export__for_transformers=for_transformers)

    from search.by_hand import package, submission_rules
    from search.show import progress

    asked = is_asked("export.for_transformers", where["overrides"])
    version = for_transformers or (file.export.for_transformers if asked else None)
    target = submission_rules.target_of(path, version, file.export.for_transformers)
    with progress.Live(1) as live:
        rules = submission_rules.check(path, target=target.version, max_model_mb=file.limits.max_size_mb)
        packed = None
        if all(rule.ok for rule in rules) and not check_only:
            packed = package.pack(
                path,
                out,
                target=target.version,
                max_model_mb=file.limits.max_size_mb,
                max_zip_mb=file.limits.max_zip_mb,
                progress=live.bytes,
                checked=rules,
            )
    if as_json:
        click.echo(json.dumps(package.to_json(rules, packed)))
    else:
        click.echo(f"{path}: {target}")
        for rule in rules:
            click.echo(f"{'✓' if rule.ok else '✗'} {rule.name}: {rule.found}")
        if packed is not None:
            click.echo(f"→ {packed.path}, {packed.bytes / 1e6:.1f} MB, sha256 {packed.sha256}")
    failed = [rule for rule in rules if not rule.ok]
    if failed:
        click.echo(
            f"optuna-search: package {path}: {len(failed)} of {len(rules)} rules fail; nothing was packed", err=True
        )
        sys.exit(1)
