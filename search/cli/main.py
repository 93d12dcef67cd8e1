"""Defines the root command, which turns errors into one line on standard error and an exit status."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from typing import Any

import click

from search import secrets
from search.cli.error_line import line_of, memory_line
from search.say import print_warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


ENVIRONMENT = (
    ("OPTUNA_SEARCH_CACHE", "Directory of converted models [default: ~/.cache/optuna-search]."),
    ("OPTUNA_SEARCH_STUDY", "Study file, as --study names it."),
    ("OPTUNA_SEARCH_CONFIG_DIR", "Directory with your study files, as --config-dir names it."),
    ("MLFLOW_TRACKING_URI", "MLflow's server or database [default: sqlite:///mlflow.db]."),
    ("MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN", "Login of MLflow's server."),
    ("PGPASSWORD", "Password of a PostgreSQL storage; ~/.pgpass works too."),
    ("HF_HOME, HF_TOKEN", "Directory and token of the Hugging Face hub."),
    ("CUDA_VISIBLE_DEVICES", "GPUs that workers use, one each."),
)
COMPLETION = (
    ("bash (~/.bashrc)", 'eval "$(_OPTUNA_SEARCH_COMPLETE=bash_source optuna-search)"'),
    ("zsh (~/.zshrc)", 'autoload -Uz compinit; compinit; eval "$(_OPTUNA_SEARCH_COMPLETE=zsh_source optuna-search)"'),
    ("fish (config.fish)", "_OPTUNA_SEARCH_COMPLETE=fish_source optuna-search | source"),
)


class Commands(click.Group):
    """Turns the project's errors into one line and an exit status."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the environment variables, and how a shell completes words."""
        with formatter.section("Environment variables (.env in the working directory may set those of MLflow)"):
            formatter.write_dl(list(ENVIRONMENT))
        with formatter.section("Completion of options, studies, keys and values (a line for the file in brackets)"):
            for shell, line in COMPLETION:
                formatter.write(f"  {shell:<20} {line}\n")  # not wrapped: it is copied

    def invoke(self, context: click.Context) -> Any:
        """Run the command; errors that are not expected pass through."""
        try:
            return super().invoke(context)
        except click.ClickException as error:
            object.__setattr__(error, "message", secrets.masked(error.message))
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            from search.processes import exit_status

            with contextlib.suppress(OSError):  # the terminal is closed
                click.echo("stopped; run the same command again to resume", err=True)
            # CPython ends `python -m` with the signal, whatever its exit status, once a KeyboardInterrupt has passed
            # through an exec() of text, as dataclasses do while they are imported; the next exec() makes it forget.
            exec("")  # noqa: S102
            context.exit(exit_status())
        except Exception as error:
            from search.errors import no_space

            full = no_space(error) if isinstance(error, OSError) else None
            exhausted = None if full or _is_ours(error) else memory_line(error)
            status = 1 if full else 2 if exhausted else _status(error)
            if status is None:
                raise
            click.echo(f"optuna-search: {secrets.masked(full or exhausted or line_of(error))}", err=True)
            context.exit(status)


def _is_ours(error: Exception) -> bool:
    """Return whether an error has a message of this project, without an import."""
    return type(error).__module__.partition(".")[0] in ("search", "compressors", "evaluator")


def _status(error: Exception) -> int | None:
    from compressors.errors import CompressionError
    from evaluator.errors import EvaluationError
    from readers.errors import ReadError
    from search.errors import SearchError

    if isinstance(error, SearchError):
        return error.exit_status
    if isinstance(error, CompressionError | EvaluationError | ReadError):
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
@click.option("--verbose", is_flag=True, help="Log what the libraries report, to standard error.")
def main(verbose: bool) -> None:
    """Find the best compressed version of a language model for the GPU at hand.

    \b
    optuna-search run                       the embedded demo, on any machine
    optuna-search run --study exaone4-1.2b --trials 100
    optuna-search status
    optuna-search export

    \b
    By hand, with the same measurements:
    optuna-search baseline
    optuna-search compress drop-layers --keep-layers 26 --save-path submit/model_drop26
    optuna-search compress -m compression.keep_layers=22,24,26,28
    optuna-search evaluate --model submit/model_drop26 --run-name drop26
    optuna-search report
    """
    secrets.install()
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        return
    warnings.filterwarnings("ignore")
    print_warnings()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
