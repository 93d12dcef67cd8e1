"""The command line: parse, call, print. No logic.

Tables for people and JSON (`--json`) go to standard output; progress and warnings to standard error.
Exit status 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

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
    return None


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
    """
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        return
    warnings.filterwarnings("ignore")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)


def study_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
        click.option(
            "--config-dir", type=click.Path(path_type=Path), help="Your study files; ./studies where there is one."
        ),
        click.option("--study-name", help="The study's name in the storage; the study file says which by default."),
        click.option("--storage", help="sqlite:///FILE or postgresql://USER@HOST/DATABASE."),
        click.option(
            "--study", default="demo", show_default=True, help="The study file: demo, exaone4-1.2b, or your own."
        ),
    ):
        command = option(command)
    return command


def _file(
    study: str,
    storage: str | None,
    study_name: str | None,
    config_dir: Path | None,
    overrides: tuple[str, ...],
    **more: Any,
) -> Any:
    from search import config

    words = list(overrides)
    for key, value in {"storage": storage, "study_name": study_name, **more}.items():
        if value is not None:
            words.append(f"{key}={json.dumps(value)}")
    return config.load(study, words, config_dir)


@main.command()
@study_options
@click.option("--trials", type=click.IntRange(min=1), help="Finished trials that the study is to hold in all.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, one per GPU.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the sampler.")
@click.option("--json", "as_json", is_flag=True, help="Print the study's state as JSON.")
def run(as_json: bool, workers: int, trials: int | None, seed: int | None, **where: Any) -> None:
    """Create a study, or go on with it, until it holds N finished trials.

    Run again after a crash or Ctrl-C, it finishes what is missing. Trailing KEY=VALUE words override the study file.

    \b
    optuna-search run --trials 50 space.precision=[bfloat16,W8A8] evaluation.backend=vllm
    """
    file = _file(**where, trials=trials, seed=seed)  # before the imports, which take seconds

    from search import progress, status, study
    from search import workers as team

    with study.Stop() as stop, progress.Live(file.trials) as live:
        the_study = team.run(file, workers, live, stop)
    _print_status(status.of(the_study), as_json)


@main.command("status")
@study_options
@click.option("--json", "as_json", is_flag=True)
def status_command(as_json: bool, **where: Any) -> None:
    """Progress, the best and the Pareto trials, and why the others ended."""
    file = _file(**where)

    from search import status, study

    _print_status(status.of(study.load(_existing(file.storage), file.study_name)), as_json)


def _existing(storage: str) -> Any:
    """Looking at a study must not make an empty database."""
    from search import errors, study

    if not study.exists(storage):
        raise errors.StorageError(
            f"storage {storage}: no such file; `optuna-search run` makes it, or name another with --storage"
        )
    return study.open_storage(storage)


@main.command()
@study_options
@click.option("--host", default="127.0.0.1", show_default=True, help="optuna-dashboard has no login: keep it local.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(1, 65535))
def dashboard(host: str, port: int, **where: Any) -> None:
    """optuna-dashboard on the study's storage and artifacts, until Ctrl-C."""
    from search import dashboard as shown

    file = _file(**where)
    storage = _existing(file.storage)
    click.echo(f"http://{host}:{port}  (Ctrl-C ends it)", err=True)
    shown.serve(storage, file.outputs / "artifacts", host, port)


@main.command()
@study_options
@click.option("--trial", "number", type=click.IntRange(min=0), help="Another than the best.")
@click.option("--to", type=click.Path(path_type=Path), default=Path("submit/model"), show_default=True)
@click.option("--json", "as_json", is_flag=True)
def export(number: int | None, to: Path, as_json: bool, **where: Any) -> None:
    """Write the best trial's checkpoint, reloaded and compared with what was measured."""
    from search import config, progress, setting, study
    from search import export as exporting

    file = _file(**where)
    the_study = study.load(_existing(file.storage), file.study_name)
    trial = exporting.choose(the_study, number)
    made_with = config.validate(the_study.user_attrs["file"], f"study {file.study_name!r}")
    with progress.Live(1) as live:
        prepared = setting.prepare(
            made_with.model_copy(update={"storage": file.storage, "outputs": file.outputs}), live.say
        )
        exported = exporting.export(prepared, trial, to, live.say)
    if as_json:
        click.echo(json.dumps(exporting.to_json(exported)))
        return
    click.echo(
        f"trial {exported.trial}, Score {exported.score:.4f}, perplexity {exported.perplexity:.3f} → {exported.path}"
    )
    click.echo(exported.compared)


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


def _print_status(state: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(state))
        return
    from rich.console import Console

    from search import report

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a file is not wrapped as a small window is
    console.print(report.status_table(state))


if __name__ == "__main__":
    main()
