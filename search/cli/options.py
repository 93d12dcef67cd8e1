"""Defines the options that several commands share, loads study files by them, and prints results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from search.config.study_file import StudyFile

PATH = click.Path(path_type=Path)


class StudyCommand(click.Command):
    """Ends its help with the config groups that KEY=VALUE words can choose from."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the config groups and what each offers."""
        write_groups(formatter)


def write_groups(formatter: click.HelpFormatter) -> None:
    """Write the config groups and what each offers, as the end of a help page."""
    from search.config import compose

    with formatter.section("Config groups (GROUP=NAME; yours in ./studies or --config-dir come first)"):
        formatter.write_dl([(group, ", ".join(names)) for group, names in compose.groups().items()])


def study_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose a study file, and its overrides."""
    for option in (
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
        click.option(
            "--config-dir",
            type=PATH,
            envvar="OPTUNA_SEARCH_CONFIG_DIR",
            help="Directory with your study files [default: ./studies where it exists].",
        ),
        click.option(
            "--study",
            default="demo",
            show_default=True,
            envvar="OPTUNA_SEARCH_STUDY",
            help="Study file: demo, exaone4-1.2b, or your own.",
        ),
    ):
        command = option(command)
    return command


def storage_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose a study file and a study in a storage."""
    for option in (
        click.option("--study-name", help="Name of the study in the storage [default: the study file's study_name]."),
        click.option(
            "--storage",
            help="Database: sqlite:///FILE or postgresql://USER@HOST/DATABASE [default: the study file's storage].",
        ),
    ):
        command = option(command)
    return study_options(command)


def json_option(help_text: str = "Print JSON to standard output [default: a table].") -> Callable[..., Any]:
    """Return the option --json."""
    return click.option("--json", "as_json", is_flag=True, help=help_text)


def load_file(study: str, config_dir: Path | None, overrides: tuple[str, ...], **options: Any) -> StudyFile:
    """Load the study file; `options` that have a value are set as they are, with a dot for `__`."""
    from search.config import compose

    return compose.load(study, overrides, config_dir, values_of(**options))


def values_of(**options: Any) -> dict[str, Any]:
    """Return the options that have a value by the dotted keys that they set."""
    given = {key.replace("__", "."): value for key, value in options.items() if value is not None}
    return {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}


def study_words(study: str, config_dir: Path | None, overrides: tuple[str, ...]) -> list[str]:
    """Return the words of the command line that choose this study file."""
    own = [] if config_dir is None else ["--config-dir", str(config_dir)]
    return ["--study", study, *own, *overrides]


def print_table(table: Any) -> None:
    """Print a rich table to standard output, at least 140 characters wide where that is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(table)
