"""Defines the commands about a study: run it, show its state, export its best trial."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    storage_options,
    study_words,
)

if TYPE_CHECKING:
    import optuna

    from search.setup.setting import Setting
    from search.show.study_state import StudyState


@main.command("run", cls=StudyCommand, groups=("model", "space", "methods", "evaluation", "tracking"))
@storage_options
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    help="Number of finished trials that the study is to hold in all [default: the study file's].",
)
@click.option(
    "--time",
    "limits__time",
    metavar="TIME",
    help="Time after which no trial is begun, such as 45s, 30m or 2h; what runs is finished [default: limits.time].",
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, one per GPU.")
@click.option("--seed", type=click.IntRange(min=0), help="Random seed of the sampler [default: the study file's].")
@click.option(
    "--distill-top",
    "top",
    type=click.IntRange(min=1),
    metavar="K",
    help="Number of best plans that cut something to distill at the end; each is measured again [default: none].",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    help="Length of each distillation in tokens [default: distillation.tokens].",
)
@json_option("Print the study's state as JSON [default: tables].")
def run_command(
    as_json: bool,
    workers: int,
    trials: int | None,
    seed: int | None,
    top: int | None,
    tokens: int | None,
    limits__time: str | None,
    **where: Any,
) -> None:
    """Create a study, or resume it, until it holds N finished trials; confirm and distill the best of them.

    After a crash or Ctrl-C, the same command finishes what is missing. Trailing KEY=VALUE words override the study
    file. Distilled models are written to submit/model_kd_NAME.

    \b
    optuna-search run --trials 50 'space.precision=[bfloat16,W8A8]' evaluation.backend=vllm
    optuna-search run --trials 50 --distill-top 3 --tokens 2000000
    """
    from evaluator import process
    from search import errors
    from search.study import early

    if tokens is not None and top is None:
        raise errors.UsageError("--tokens needs --distill-top: it sets the length of the distillation")
    file = load_file(
        **where, trials=trials, seed=seed, limits__time=limits__time
    )  # before the imports, which take seconds
    early.refuse_another_definition(file)
    process.warm_ahead(file.evaluation.backend)

    from search import confirm, failures, finalists, processes
    from search.show import progress
    from search.study import status
    from search.study.workers import run_study

    words = study_words(where["study"], where["config_dir"], where["overrides"])
    outcome = None
    with processes.Stop() as stop, progress.Live(file.trials) as live:

        def say(text: str) -> None:
            stop.check()
            live.say(text)

        wanted = None
        if top is not None:
            wanted = finalists.wanted_of(file, top, tokens or file.distillation.tokens, workers, say)

        def then(setting: Setting, study: optuna.Study) -> None:
            if confirm.why_nothing(study, setting.file) is not None:
                return
            try:
                confirm.confirm_study(setting, study, say, live.warn)
            except failures.FAILURES as error:  # the study itself has ended well
                live.warn(f"not confirmed: {failures.why(error)['reason']}; `optuna-search confirm` tries again")

        the_study = run_study(file, workers, live, stop, _dashboard_command(**where), then)
        if wanted is not None:
            outcome = finalists.distill_finalists(wanted, the_study, say, live.warn, words)
    state = status.of(the_study)
    if outcome is None:
        _print_status(state, as_json, option="optuna-search status --all")
        return
    state = dataclasses.replace(state, distilled=outcome.rows, passed_over=outcome.passed_over)
    _print_status(state, as_json, option="optuna-search status --all")
    if outcome.rows and state.best_of_all is not None and not as_json:
        named = {"--storage": where["storage"], "--study-name": where["study_name"]}
        own = [word for name, value in named.items() if value is not None for word in (name, value)]
        for line in finalists.commands(state.best_of_all, words, own):
            click.echo(f"  {line}")
    if any(row.result is None for row in outcome.rows):
        sys.exit(1)


@main.command("confirm", cls=StudyCommand, groups=())
@storage_options
@click.option(
    "--top",
    "confirm__top",
    type=click.IntRange(min=1),
    help="Number of best trials to confirm [default: confirm.top].",
)
@click.option(
    "--pairs",
    "confirm__pairs",
    type=click.IntRange(min=1),
    help="Number of fresh pairs of engine processes for each [default: confirm.pairs].",
)
@json_option("Print the confirmed trials as JSON [default: a table].")
def confirm_command(as_json: bool, confirm__top: int | None, confirm__pairs: int | None, **where: Any) -> None:
    """Measure the best trials again, in fresh engine processes and on text that no search saw.

    `run` does it by itself at its end. What is confirmed already is not measured again: after a crash or Ctrl-C the
    same command does what is missing, and --pairs adds pairs to those that there are. `export` takes the best.

    \b
    optuna-search confirm --study exaone4-1.2b
    optuna-search confirm --top 5 --pairs 6
    optuna-search confirm 'confirm.server={max_model_len: 4096, enable_prefix_caching: true}'
    """
    file = load_file(**where, confirm__top=confirm__top, confirm__pairs=confirm__pairs)

    from search import confirm, errors, processes
    from search.setup import setting
    from search.show import progress
    from search.study import status, storage, workers

    the_study = storage.load(_existing(file.storage), file.study_name)
    study_file = confirm.study_file(the_study, file)
    nothing = confirm.why_nothing(the_study, study_file)
    if nothing is not None:
        raise errors.UsageError(nothing)
    with processes.Stop() as stop, progress.Live(1) as live:

        def say(text: str) -> None:
            stop.check()
            live.say(text)

        prepared = workers.as_studied(setting.prepare(study_file, say, search=False), the_study)
        rows = confirm.confirm_study(prepared, the_study, say, live.warn)
    if as_json:
        click.echo(json.dumps([row.to_dict() for row in rows]))
    else:
        _print_confirmed(status.of(the_study))
    if any(row.failure is not None for row in rows):
        sys.exit(1)


@main.command("forecast", cls=StudyCommand)
@storage_options
@click.option(
    "--plot",
    type=PATH,
    help="Plot to write, .png or .html: what each change costs and pays, and the best plans [default: none].",
)
@json_option()
def forecast_command(as_json: bool, plot: Path | None, **where: Any) -> None:
    """Forecast what any plan of the space would score here, before a single trial.

    Times a few models with random weights in turn with the base model, and scores each cut by itself in memory. Shows
    which precision, width and depth pays on this machine, what each loses, and the best plans. `run` uses the tables.

    \b
    optuna-search forecast --study exaone4-1.2b --plot forecast.png
    """
    file = load_file(**where)

    from evaluator import process

    process.warm_ahead(file.evaluation.backend)

    from search.by_hand import forecast
    from search.setup import setting
    from search.show import forecast_view, plots, progress

    if plot is not None:
        plots.require_suffix(plot)

    with progress.Live(1) as live:
        view = forecast.forecast(setting.prepare(file, live.say), live.say)
        if plot is not None:
            plots.plot_forecast(view, plot)
    if as_json:
        click.echo(json.dumps(view.to_dict()))
        return
    print_table(forecast_view.forecast_table(view))


@main.command("status", cls=StudyCommand, groups=())
@storage_options
@click.option(
    "--plot",
    type=PATH,
    help="File to draw the Pareto front into, PerfNorm against SpeedNorm, .png or .html [default: none].",
)
@click.option("--all", "everything", is_flag=True, help="List all ended trials [default: the last 12].")
@json_option()
def status_command(plot: Path | None, everything: bool, as_json: bool, **where: Any) -> None:
    """Show progress, the best and the Pareto trials, and why the others ended.

    \b
    optuna-search status --study exaone4-1.2b
    optuna-search status --all
    optuna-search status --plot front.png
    """
    file = load_file(**where)

    from search.study import status, storage

    if plot is not None:
        from search.show import plots

        plots.require_suffix(plot)
    the_study = storage.load(_existing(file.storage), file.study_name)
    state = status.of(the_study)
    if plot is not None:
        rows, own = [trial.row() for trial in state.pareto], the_study.user_attrs.get("file", {}).get("score", {})
        perf, speed = (own.get(name, getattr(file.score, name)) for name in ("weight_perf", "weight_speed"))
        plots.plot_scores(rows, plot, perf, speed, state.stands_out)
    _print_status(state, as_json, everything=everything)


def _dashboard_command(
    study: str, config_dir: Path | None, overrides: tuple[str, ...], storage: str | None, study_name: str | None
) -> str:
    """Return the command that shows this study: with the words that choose its storage."""
    own = tuple(word for word in overrides if word.startswith(("storage=", "study_name=", "outputs=")))
    named = {"--storage": storage, "--study-name": study_name}
    options = [word for name, value in named.items() if value is not None for word in (name, value)]
    return shlex.join(["optuna-search", "dashboard", *study_words(study, config_dir, own), *options])


def _existing(url: str) -> Any:
    """Open the storage, which has to exist: reading a study must not create an empty database."""
    from search import errors
    from search.study import storage

    if not storage.exists(url):
        raise errors.StorageError(
            f"storage {url}: no such file; `optuna-search run` makes it, or name another with --storage"
        )
    return storage.open_storage(url)


def _print_status(state: StudyState, as_json: bool, *, everything: bool = False, option: str = "--all") -> None:
    from search.show import tables, verdict

    if as_json:
        click.echo(json.dumps(state.to_dict()))
        sentence = verdict.of_study(state)
        if sentence is not None:
            click.echo(sentence, err=True)
        return
    print_table(tables.status_table(state, everything=everything, option=option))


def _print_confirmed(state: StudyState) -> None:
    from search.show import tables

    print_table(tables.confirmed_table(state))


@main.command("dashboard", cls=StudyCommand, groups=())
@storage_options
@click.option(
    "--host", type=TEXT, default="127.0.0.1", show_default=True, help="Address; optuna-dashboard has no login."
)
@click.option("--port", default=8080, show_default=True, type=click.IntRange(1, 65535), help="Port.")
def dashboard_command(host: str, port: int, **where: Any) -> None:
    """Serve optuna-dashboard on the study's storage and artifacts, until Ctrl-C.

    \b
    optuna-search dashboard --port 8081
    """
    from search.study import dashboard

    file = load_file(**where)
    storage = _existing(file.storage)
    click.echo(f"http://{host}:{port}  (Ctrl-C ends it)", err=True)
    dashboard.serve(storage, file.outputs / "artifacts", host, port)


@main.command("export", cls=StudyCommand, groups=())
@storage_options
@click.option(
    "--trial",
    "number",
    type=click.IntRange(min=0),
    help="Number of the trial to export [default: the best confirmed one, else the best].",
)
@click.option(
    "--to", type=PATH, default=Path("submit/model"), show_default=True, help="Directory that the model is written to."
)
@click.option(
    "--for-transformers",
    type=TEXT,
    help="Version of transformers that is to read it, such as 4.57.3 [default: the study file's].",
)
@json_option("Print JSON to standard output [default: two lines].")
def export_command(number: int | None, to: Path, for_transformers: str | None, as_json: bool, **where: Any) -> None:
    """Write the best trial's checkpoint, reloaded and compared with what was measured.

    \b
    optuna-search export
    optuna-search export --trial 7 --to submit/model_7
    """
    from search.by_hand import export
    from search.config import compose
    from search.setup import setting
    from search.show import progress, verdict
    from search.study import status, storage, workers

    file = load_file(**where, export__for_transformers=for_transformers)
    the_study = storage.load(_existing(file.storage), file.study_name)
    trial, confirmed = export.choose(the_study, number)
    study_file = compose.restored(the_study.user_attrs["file"], f"study {file.study_name!r}")
    with progress.Live(1) as live:
        prepared = setting.prepare(
            study_file.model_copy(update={"storage": file.storage, "outputs": file.outputs}), live.say
        )
        prepared = workers.as_studied(prepared, the_study)
        asked = for_transformers is not None or is_asked("export.for_transformers", where["overrides"])
        target = (file if asked else study_file).export.for_transformers
        exported = export.export(prepared, trial, to, live.say, target, confirmed)
    state = status.of(the_study)
    summary = status.summary(trial, state.goal)
    summary = dataclasses.replace(summary, score=exported.score, score_se=exported.score_se)
    sentence = verdict.of_confirmed(confirmed) if confirmed is not None else None
    sentence = sentence or verdict.of_study(state) or verdict.of_trial(summary, state.base_score)
    if as_json:
        click.echo(json.dumps(exported.to_dict()))
    else:
        score = exported.result or progress.score_text(exported.score, exported.score_se)
        chosen = "" if number is not None or confirmed is None else ", the best of those that are confirmed"
        click.echo(f"trial {exported.trial}{chosen}, {score}, perplexity {exported.perplexity:.3f} → {exported.path}")
        click.echo(exported.compared)
        if exported.length_flag is not None:
            click.echo(exported.length_flag)
    if sentence is not None:
        click.echo(sentence, err=as_json)
