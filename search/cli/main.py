"""Defines the root command, which turns errors into one line on standard error and an exit status."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from typing import Any

import click

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class Commands(click.Group):
    """Turns the project's errors into one line and an exit status."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command; errors that are not expected pass through."""
        try:
            return super().invoke(context)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
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
            status = _status(error) if full is None else 1
            if status is None:
                raise
            click.echo(f"optuna-search: {' '.join((full or str(error)).split())}", err=True)
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
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        return
    warnings.filterwarnings("ignore")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
