"""The command line: parse, call, print. No logic.

Tables for people and JSON (`--json`) go to standard output; progress and warnings to standard error.
Exit status 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class Commands(click.Group):
    """Turns the project's errors into one line and an exit status; heavy imports wait until a command runs."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("stopped; run the same command again to go on", err=True)
            # CPython ends `python -m` with the signal, whatever its exit status, once a KeyboardInterrupt has passed
            # through an exec() of text, as dataclasses do while they are imported; the next exec() makes it forget.
            exec("")  # noqa: S102
            context.exit(130)
        except Exception as error:
            status = _status(error)
            if status is None:
                raise
            click.echo(f"optuna-search: {' '.join(str(error).split())}", err=True)
            context.exit(status)


def _status(error: Exception) -> int | None:
    from compressors.errors import CompressionError
    from evaluator.errors import EvaluationError
    from search.errors import SearchError

    if isinstance(error, SearchError):
        return error.exit_status
    if isinstance(error, CompressionError | EvaluationError):
        return 2
    if isinstance(error, (OSError, *_database_errors())):
        return 2
    from search.failures import OUT_OF_MEMORY  # imports torch: last

    return 2 if isinstance(error, OUT_OF_MEMORY) else None


def _database_errors() -> tuple[type[Exception], ...]:
    import sqlalchemy.exc
    from optuna.exceptions import StorageInternalError

    return (StorageInternalError, sqlalchemy.exc.OperationalError)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="optuna-search")
@click.option("--verbose", is_flag=True, help="Log what the libraries say, to standard error.")
def main(verbose: bool) -> None:
    """Find the best compressed version of a language model for the GPU at hand.

    \b
    optuna-search run                       the embedded demo, on any machine
    optuna-search run --study exaone4-1.2b --trials 100
    optuna-search status
    optuna-search export

    \b
    By hand, on the same bench:
    optuna-search baseline
    optuna-search compress drop-layers --keep-layers 26 --save-path submit/model_drop26
    optuna-search compress -m compression.keep_layers=22,24,26,28
    optuna-search evaluate --model submit/model_drop26 --run-name drop26
    optuna-search report
    """
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        return
    warnings.filterwarnings("ignore")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)


class StudyCommand(click.Command):
    """Ends its help with the config groups that KEY=VALUE words can choose from."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        from search.config import compose

        with formatter.section("Config groups (GROUP=NAME; yours in ./studies or --config-dir come first)"):
            formatter.write_dl([(group, ", ".join(names)) for group, names in compose.groups().items()])


def study_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
        click.option(
            "--config-dir",
            type=click.Path(path_type=Path),
            envvar="OPTUNA_SEARCH_CONFIG_DIR",
            help="Your study files; ./studies where there is one.",
        ),
        click.option(
            "--study",
            default="demo",
            show_default=True,
            envvar="OPTUNA_SEARCH_STUDY",
            help="The study file: demo, exaone4-1.2b, or your own.",
        ),
    ):
        command = option(command)
    return command


def storage_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--study-name", help="The study's name in the storage; the study file says which by default."),
        click.option("--storage", help="sqlite:///FILE or postgresql://USER@HOST/DATABASE."),
    ):
        command = option(command)
    return study_options(command)


def _file(study: str, config_dir: Path | None, overrides: tuple[str, ...], **more: Any) -> Any:
    from search.config import compose

    return compose.load(study, _words(overrides, **more), config_dir)


def _words(overrides: tuple[str, ...], **more: Any) -> list[str]:
    """The overrides, and the options that stand for one, last."""
    given = {key.replace("__", "."): value for key, value in more.items() if value is not None}
    return [
        *overrides,
        *(f"{key}={json.dumps(str(value) if isinstance(value, Path) else value)}" for key, value in given.items()),
    ]


@main.command(cls=StudyCommand)
@storage_options
@click.option("--trials", type=click.IntRange(min=1), help="Finished trials that the study is to hold in all.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, one per GPU.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the sampler.")
@click.option(
    "--distill-top",
    "top",
    type=click.IntRange(min=1),
    metavar="K",
    help="Then distil the K best plans that cut something, quantise and measure them again: submit/model_kd_NAME.",
)
@click.option("--tokens", type=click.IntRange(min=1), help="Of each distillation; distillation.tokens by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the study's state as JSON.")
def run(
    as_json: bool,
    workers: int,
    trials: int | None,
    seed: int | None,
    top: int | None,
    tokens: int | None,
    **where: Any,
) -> None:
    """Create a study, or go on with it, until it holds N finished trials; distil the best of them.

    Run again after a crash or Ctrl-C, it finishes what is missing. Trailing KEY=VALUE words override the study file.

    \b
    optuna-search run --trials 50 space.precision=[bfloat16,W8A8] evaluation.backend=vllm
    optuna-search run --trials 50 --distill-top 3 --tokens 2000000
    """
    from search import errors

    if tokens is not None and top is None:
        raise errors.UsageError(f"--tokens {tokens}: is of a distillation; say --distill-top K too")
    file = _file(**where, trials=trials, seed=seed)  # before the imports, which take seconds

    from search import finalists, processes
    from search.show import progress
    from search.study import status as study_status
    from search.study import workers as team

    words = _study_words(where["study"], where["config_dir"], where["overrides"])
    outcome = None
    with processes.Stop() as stop, progress.Live(file.trials) as live:

        def say(text: str) -> None:
            stop.check()
            live.say(text)

        wanted = None
        if top is not None:
            wanted = finalists.wanted_of(file, top, tokens or file.distillation.tokens, workers, say)
        the_study = team.run(file, workers, live, stop)
        if wanted is not None:
            outcome = finalists.distil(wanted, the_study, say, live.warn, words)
    state = study_status.of(the_study)
    if outcome is None:
        _print_status(state, as_json)
        return
    state = dataclasses.replace(state, distilled=outcome.rows, passed_over=outcome.passed_over)
    _print_status(state, as_json)
    if outcome.rows and state.best_of_all is not None and not as_json:
        named = {"--storage": where["storage"], "--study-name": where["study_name"]}
        own = [word for name, value in named.items() if value is not None for word in (name, value)]
        for line in finalists.commands(state.best_of_all, words, own):
            click.echo(f"  {line}")
    if any(row.result is None for row in outcome.rows):
        sys.exit(1)


@main.command("status", cls=StudyCommand)
@storage_options
@click.option("--json", "as_json", is_flag=True)
def status_command(as_json: bool, **where: Any) -> None:
    """Progress, the best and the Pareto trials, and why the others ended."""
    file = _file(**where)

    from search.study import status as study_status
    from search.study import storage as study_storage

    _print_status(study_status.of(study_storage.load(_existing(file.storage), file.study_name)), as_json)


def _existing(storage: str) -> Any:
    """Looking at a study must not make an empty database."""
    from search import errors
    from search.study import storage as study_storage

    if not study_storage.exists(storage):
        raise errors.StorageError(
            f"storage {storage}: no such file; `optuna-search run` makes it, or name another with --storage"
        )
    return study_storage.open_storage(storage)


@main.command(cls=StudyCommand)
@storage_options
@click.option("--host", default="127.0.0.1", show_default=True, help="optuna-dashboard has no login: keep it local.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(1, 65535))
def dashboard(host: str, port: int, **where: Any) -> None:
    """optuna-dashboard on the study's storage and artifacts, until Ctrl-C."""
    from search.study import dashboard as shown

    file = _file(**where)
    storage = _existing(file.storage)
    click.echo(f"http://{host}:{port}  (Ctrl-C ends it)", err=True)
    shown.serve(storage, file.outputs / "artifacts", host, port)


@main.command(cls=StudyCommand)
@storage_options
@click.option("--trial", "number", type=click.IntRange(min=0), help="Another than the best.")
@click.option("--to", type=click.Path(path_type=Path), default=Path("submit/model"), show_default=True)
@click.option("--for-transformers", help="The version that is to read it, such as 4.57.3; the study file's by default.")
@click.option("--json", "as_json", is_flag=True)
def export(number: int | None, to: Path, for_transformers: str | None, as_json: bool, **where: Any) -> None:
    """Write the best trial's checkpoint, reloaded and compared with what was measured."""
    from search.by_hand import export as exporting
    from search.config import compose
    from search.setup import setting
    from search.show import progress
    from search.study import storage as study_storage

    file = _file(**where, export__for_transformers=for_transformers)
    the_study = study_storage.load(_existing(file.storage), file.study_name)
    trial = exporting.choose(the_study, number)
    made_with = compose.validate(the_study.user_attrs["file"], f"study {file.study_name!r}")
    with progress.Live(1) as live:
        prepared = setting.prepare(
            made_with.model_copy(update={"storage": file.storage, "outputs": file.outputs}), live.say
        )
        target = file.export.for_transformers or made_with.export.for_transformers
        exported = exporting.export(prepared, trial, to, live.say, target)
    if as_json:
        click.echo(json.dumps(exported.to_dict()))
        return
    click.echo(
        f"trial {exported.trial}, Score {exported.score:.4f}, perplexity {exported.perplexity:.3f} → {exported.path}"
    )
    click.echo(exported.compared)


# -- by hand -------------------------------------------------------------------------------------------------


@main.command(cls=StudyCommand)
@study_options
@click.option("--model", type=click.Path(path_type=Path), help="Another base model than the study file's.")
@click.option("--again", is_flag=True, help="Measure it though its measurement is known.")
@click.option("--json", "as_json", is_flag=True)
def baseline(model: Path | None, again: bool, as_json: bool, **where: Any) -> None:
    """Measure the base model → outputs/baseline_result.json and an MLflow run tagged `baseline`."""
    file = _file(**where, model__source=model)

    from search.by_hand import multirun as jobs
    from search.setup import setting
    from search.show import progress
    from search.stages.bench import BASELINE_RESULT, Bench

    with progress.Live(1) as live, Bench(setting.prepare(file, live.say, search=False), live.say, again=again) as bench:
        measured = jobs.baseline(bench, live.warn)
        place = bench.setting.outputs / BASELINE_RESULT
    if as_json:
        click.echo(json.dumps(measured.to_dict()))
        return
    click.echo(
        f"baseline {file.model.source}: perplexity {measured.perplexity:.3f}, "
        f"{measured.time_per_token_ms:.3f} ms per token, "
        f"{measured.tokens_per_sec:.1f} tokens per second, {measured.model_size_mb:.1f} MB "
        f"({measured.backend}, {measured.device}) → {place}"
    )


@main.command(cls=StudyCommand)
@study_options
@click.option("--model", "path", type=click.Path(path_type=Path), default=Path("submit/model"), show_default=True)
@click.option("--run-name", help="Of the run in MLflow; the directory's name by default.")
@click.option("--baseline", "only_baseline", is_flag=True, help="Measure the base model alone, as `baseline` does.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_context
def evaluate(
    context: click.Context, /, path: Path, run_name: str | None, only_baseline: bool, as_json: bool, **where: Any
) -> None:
    """Measure any checkpoint against the baseline → PATH/eval_result.json and an MLflow run."""
    if only_baseline:
        context.invoke(baseline, model=None, again=False, as_json=as_json, **where)
        return
    file = _file(**where)

    from search.by_hand import multirun as jobs
    from search.setup import setting
    from search.show import progress
    from search.stages.bench import Bench

    with progress.Live(1) as live, Bench(setting.prepare(file, live.say, search=False), live.say) as bench:
        found = jobs.evaluate(bench, path, run_name or path.resolve().name, live.warn, _study_words(**where))
    if as_json:
        click.echo(json.dumps(found.to_dict()))
        return
    _print_comparison([found.baseline_row(), found.row(path)])
    click.echo(f"→ {path}/eval_result.json")


def _study_words(study: str, config_dir: Path | None, overrides: tuple[str, ...]) -> list[str]:
    own = [] if config_dir is None else ["--config-dir", str(config_dir)]
    return ["--study", study, *own, *overrides]


class Methods(click.Group):
    """`compress` with a method's name, or without one: then the study file and its overrides say what is made."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = [BY_CONFIG, *args]
        return super().parse_args(context, args or ["--help"])

    def list_commands(self, context: click.Context) -> list[str]:
        return [name for name in super().list_commands(context) if name != BY_CONFIG]

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        StudyCommand.format_epilog(self, context, formatter)  # type: ignore[arg-type]


BY_CONFIG = "by-config"


@main.group(cls=Methods)
def compress() -> None:
    """Make one compressed model, or several, by hand; the plan and the code are those of a study's trial.

    \b
    optuna-search compress drop-layers --keep-layers 26 --save-path submit/model_drop26
    optuna-search compress experiments=drop_layers            a file of studies/experiments
    optuna-search compress compression.keep_layers=24 compression.scheme=W8A8 experiment_name=drop24_w8a8
    optuna-search compress -m compression.keep_layers=22,24,26,28   multirun: compress and evaluate each, and compare
    """


def method_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True),
        click.option("--evaluate", "evaluated", is_flag=True, help="Also measure it against the baseline."),
        click.option(
            "-m",
            "--multirun",
            is_flag=True,
            help="A job for each of the values that are listed; evaluates and compares.",
        ),
        click.option("--for-transformers", help="The version that is to read it, such as 4.57.3."),
        click.option(
            "--save-path", type=click.Path(path_type=Path), help="submit/model; a multirun's is submit/model_NAME."
        ),
        click.option("--model", type=click.Path(path_type=Path), help="Another base model than the study file's."),
    ):
        command = option(command)
    return study_options(command)


IMPORTANCE = click.option(
    "--importance", metavar="activation|energy|flap|obs|kl", help="How those that stay are chosen."
)
REPAIR = click.option(
    "--repair", metavar="none|ridge|stream", help="What stays takes over what goes, by least squares."
)


@compress.command(BY_CONFIG, cls=StudyCommand)
@method_options
def by_config(**options: Any) -> None:
    """What the study file, an experiment and the overrides say."""
    _compress({}, **options)


@compress.command("drop-layers", cls=StudyCommand)
@click.option("--keep-layers", metavar="N", help="How many stay.")
@click.option(
    "--drop-from",
    metavar="importance|kl|kl-look-ahead|top|bottom|LIST",
    help="Which go; a list such as 20,21 numbers them from 0.",
)
@method_options
def drop_layers(keep_layers: str | None, drop_from: str | None, **options: Any) -> None:
    """Fewer layers."""
    listed = drop_from is not None and drop_from[:1].isdigit()
    _compress(
        {"method": "drop_layers", "keep_layers": keep_layers, "drop_from": f"[{drop_from}]" if listed else drop_from},
        **options,
    )


@compress.command("prune-heads", cls=StudyCommand)
@click.option("--keep-heads", metavar="N", help="Query heads.")
@click.option("--keep-kv-heads", metavar="N", help="Key/value heads, with the query heads that share them.")
@IMPORTANCE
@REPAIR
@method_options
def prune_heads(
    keep_heads: str | None, keep_kv_heads: str | None, importance: str | None, repair: str | None, **options: Any
) -> None:
    """Fewer attention heads."""
    keys = {"keep_heads": keep_heads, "keep_kv_heads": keep_kv_heads, "importance": importance, "repair": repair}
    _compress({"method": "prune_heads", **keys}, **options)


@compress.command("reduce-hidden", cls=StudyCommand)
@click.option("--target-dim", metavar="N", required=True, help="hidden_size of the result.")
@click.option("--rotation", metavar="none|pca", help="pca: its principal components stay.")
@REPAIR
@method_options
def reduce_hidden(target_dim: str, rotation: str | None, repair: str | None, **options: Any) -> None:
    """A narrower residual stream."""
    keys = {"hidden_size": target_dim, "rotation": rotation, "repair": repair}
    _compress({"method": "reduce_hidden", **keys}, **options)


@compress.command("reduce-ffn", cls=StudyCommand)
@click.option("--target-dim", metavar="N", required=True, help="intermediate_size of the result.")
@IMPORTANCE
@REPAIR
@method_options
def reduce_ffn(target_dim: str, importance: str | None, repair: str | None, **options: Any) -> None:
    """Narrower feed-forward networks."""
    keys = {"intermediate_size": target_dim, "importance": importance, "repair": repair}
    _compress({"method": "reduce_ffn", **keys}, **options)


@compress.command("quantize", cls=StudyCommand)
@click.option("--scheme", metavar="W8A8|FP8_DYNAMIC|W4A16", required=True)
@click.option("--smoothing", metavar="none|smoothquant", help="smoothquant: inputs are scaled before they are rounded.")
@click.option("--quantizer", metavar="nearest|mse|gptq")
@click.option("--group-size", metavar="32|64|128", help="Of W4A16; the largest that fits by default.")
@click.option("--keep-16-bit", metavar="N", help="So many projections stay unquantised, the most sensitive first.")
@method_options
def quantize(
    scheme: str,
    smoothing: str | None,
    quantizer: str | None,
    group_size: str | None,
    keep_16_bit: str | None,
    **options: Any,
) -> None:
    """Weights as compressed-tensors."""
    how = {"smoothing": smoothing, "quantizer": quantizer, "group_size": group_size, "keep_16_bit": keep_16_bit}
    keys = {"scheme": scheme, **how}
    _compress({"method": "quantize", **keys}, **options)


@compress.command("cast", cls=StudyCommand)
@click.option("--dtype", metavar="float16|bfloat16|float32", required=True)
@method_options
def cast(dtype: str, **options: Any) -> None:
    """Another floating-point type."""
    _compress({"method": "cast", "dtype": dtype}, **options)


@compress.command("distill", cls=StudyCommand)
@study_options
@click.option("--student", type=click.Path(path_type=Path), required=True, help="A cut model that is not quantised.")
@click.option("--tokens", type=click.IntRange(min=1), help="Of training; distillation.tokens by default.")
@click.option("--model", type=click.Path(path_type=Path), help="Another teacher than the study file's model.")
@click.option("--save-path", type=click.Path(path_type=Path), help="submit/model_kd_NAME by default.")
@click.option("--for-transformers", help="The version that is to read it, such as 4.57.3.")
@click.option("--json", "as_json", is_flag=True)
def distill(
    student: Path,
    tokens: int | None,
    model: Path | None,
    save_path: Path | None,
    for_transformers: str | None,
    as_json: bool,
    **where: Any,
) -> None:
    """Train a cut model to give the original's distributions (KL on the logits); a killed call goes on.

    \b
    optuna-search compress distill --student submit/model_drop28 --tokens 2000000
    optuna-search compress quantize --model submit/model_kd_drop28 --scheme W8A8 --save-path submit/model_kd_drop28_w8a8
    """
    file = _file(**where, model__source=model, export__for_transformers=for_transformers)

    from search.by_hand import distill as distillation
    from search.setup import setting
    from search.show import progress

    to = save_path or student.with_name(f"model_kd_{student.name.removeprefix('model').strip('_') or 'model'}")
    with progress.Live(1) as live:
        prepared = setting.prepare(file, live.say, search=False, engine=False)
        wanted = tokens or file.distillation.tokens
        found = distillation.distil(prepared, student, wanted, to, file.export.for_transformers, live.say)
    if as_json:
        click.echo(json.dumps({**distillation.facts(found), "path": str(to)}))
        return
    click.echo(
        f"held-out KL {found.kl_before:.4f} → {found.kl_best:.4f} in {found.tokens:,} tokens, {found.seconds:.0f} s, "
        f"{found.tokens_per_second:,.0f} tokens per second ({found.stopped})"
    )
    click.echo(f"written: {to}")


def _compress(
    keys: dict[str, str | None],
    model: Path | None,
    save_path: Path | None,
    for_transformers: str | None,
    multirun: bool,
    evaluated: bool,
    as_json: bool,
    study: str,
    config_dir: Path | None,
    overrides: tuple[str, ...],
) -> None:
    from search.config import compose

    asked = [f"compression.{key}={value}" for key, value in keys.items() if value is not None]
    words = _words((*asked, *overrides), model__source=model, export__for_transformers=for_transformers)
    each = compose.sweep(words, config_dir) if multirun else [words]
    files = [(compose.load(study, one, config_dir), one) for one in each]

    from search.by_hand import compress as compressing
    from search.by_hand import multirun as jobs
    from search.setup import setting
    from search.show import progress, tables

    with progress.Live(len(files)) as live:
        planned = jobs.plan_jobs(
            [(file, _study_words(study, config_dir, tuple(one))) for file, one in files],
            save_path,
            live.say,
            engine=multirun or evaluated,
        )
        if multirun or evaluated:
            rows = jobs.run(planned, live.say, live.warn, live.job_ended)
        else:
            (job,) = planned
            prepared = setting.prepare(job.file, live.say, search=False, engine=False)
            outcome = compressing.foresee(job.plan, prepared)
            live.print(tables.outcome_table(compressing.to_json(outcome), prepared.identity.to_dict()))
            for warning in outcome.warnings:
                live.warn(warning)
            made = compressing.compress(outcome, prepared, job.path, job.file.export.for_transformers, live.say)
    if not (multirun or evaluated):
        if as_json:
            click.echo(json.dumps({**compressing.to_json(outcome), "path": str(made.path), "reused": made.reused}))
            return
        for change in made.changes:
            click.echo(change)
        how = "was there already" if made.reused else "written, in place of another" if made.replaced else "written"
        click.echo(f"{how}: {made.path}")
        return
    if as_json:
        click.echo(json.dumps([row.to_dict() for row in rows]))
    else:
        _print_comparison(jobs.with_baseline(rows))
    if any(row.result is None for row in rows):
        sys.exit(1)


@main.command("config", cls=StudyCommand)
@study_options
def config_command(study: str, config_dir: Path | None, overrides: tuple[str, ...]) -> None:
    """Print the composed configuration, every key of it, as YAML."""
    from search.config import compose

    click.echo(compose.as_yaml(study, overrides, config_dir), nl=False)


@main.command(cls=StudyCommand)
@study_options
@click.option("--model", type=click.Path(path_type=Path), help="Another model than the study file's.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw it: a .png or .html file.")
@click.option(
    "--importance", is_flag=True, help="Measure the layers' importance on the calibration text, if it isn't known."
)
@click.option("--json", "as_json", is_flag=True)
def analyze(model: Path | None, plot: Path | None, importance: bool, as_json: bool, **where: Any) -> None:
    """The structure of a model: parameters and bytes by part, heads, what could be cut and what each cut saves."""
    file = _file(**where, model__source=model)

    from search.by_hand import multirun as jobs
    from search.show import plots, progress, structure

    if plot is not None:
        plots.require_suffix(plot)
    with progress.Live(1) as live:
        analysis = jobs.analyze(file, live.say, importance=importance)
    if plot is not None:
        plots.plot_structure(analysis, plot)
    if as_json:
        click.echo(json.dumps(analysis.to_dict()))
        return
    _print(structure.render(analysis))
    if plot is not None:
        click.echo(f"→ {plot}")


@main.command("report")
@click.option("-e", "--experiment", help="The report's name: outputs/DATE_NAME/DATE_report.md.")
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An evaluated model; submit/ by default.",
)
@click.option("-d", "--description", help="What was done, in words.")
@click.option("--print-only", is_flag=True, help="Print the report; write nothing.")
@click.option("--outputs", type=click.Path(path_type=Path), default=Path("outputs"), show_default=True)
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Of a comparison: PerfNorm against SpeedNorm, .png or .html."
)
@click.option("--json", "as_json", is_flag=True)
def report_command(
    experiment: str | None,
    models: tuple[Path, ...],
    description: str | None,
    print_only: bool,
    outputs: Path,
    plot: Path | None,
    as_json: bool,
) -> None:
    """The report of one evaluated model (-e NAME -m PATH), or all evaluated models in one table, "
    "the best Score first."""
    import datetime

    from search import errors
    from search.by_hand import report
    from search.show import plots

    if experiment is None:
        if plot is not None:
            plots.require_suffix(plot)
        found = report.all_evaluated(models or (Path("submit"),))
        rows = report.compared(found)
        if plot is not None:
            plots.plot_scores(rows[1:], plot, **report.weights(found[0][1].formula))
        if as_json:
            click.echo(json.dumps([row.to_dict() for row in rows]))
        else:
            _print_comparison(rows)
        return
    if len(models) > 1:
        raise errors.UsageError(f"report -e {experiment}: is of one model, and {len(models)} were named with -m")
    path = models[0] if models else Path("submit/model")
    one, today = report.evaluated(path), datetime.date.today()
    if print_only:
        click.echo(report.text(one, path, experiment, description, today), nl=False)
        return
    written = report.write(one, path, experiment, description, outputs, today)
    click.echo(json.dumps({"report": str(written)}) if as_json else f"→ {written}")


@main.command(cls=StudyCommand)
@study_options
@click.option("--model", "path", type=click.Path(path_type=Path), default=Path("submit/model"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("submit.zip"), show_default=True)
@click.option(
    "--for-transformers",
    help="The version that is to read it, such as 4.57.3; by default what the study or the model says, or 4.57.3.",
)
@click.option("--check-only", is_flag=True, help="Check the list; write nothing.")
@click.option("--json", "as_json", is_flag=True)
def package(path: Path, out: Path, for_transformers: str | None, check_only: bool, as_json: bool, **where: Any) -> None:
    """Check the submission list and write submit.zip with model/… at its root."""
    file = _file(**where, export__for_transformers=for_transformers)

    from compressors.model import transformers_version
    from search.by_hand import compress as compressing
    from search.by_hand import package as packing
    from search.by_hand import submission_rules
    from search.show import progress

    target = file.export.for_transformers or compressing.target_of(path) or transformers_version.DEFAULT
    with progress.Live(1) as live:
        rules = submission_rules.check(path, target=target, max_model_mb=file.limits.max_size_mb)
        packed = None
        if all(rule.ok for rule in rules) and not check_only:
            packed = packing.pack(
                path,
                out,
                target=target,
                max_model_mb=file.limits.max_size_mb,
                max_zip_mb=file.limits.max_zip_mb,
                progress=live.bytes,
                checked=rules,
            )
    if as_json:
        click.echo(json.dumps(packing.to_json(rules, packed)))
    else:
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


@main.command()
@click.option("--json", "as_json", is_flag=True)
def doctor(as_json: bool) -> None:
    """What this machine can do: GPU, engines, versions, memory, disk."""
    from search import doctor as examination

    found = examination.examine()
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            click.echo(f"{name}:")
            for key, text in value.items():
                click.echo(f"  {key:<20} {text if text is not None else '–'}")
        else:
            click.echo(f"{name:<22} {value if value is not None else '–'}")


def _print_status(state: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(state.to_dict()))
        return
    from search.show import tables

    _print(tables.status_table(state))


def _print_comparison(rows: Any) -> None:
    from search.show import tables

    _print(tables.comparison(rows))


def _print(table: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a file is not wrapped as a small window is
    console.print(table)


if __name__ == "__main__":
    main()
