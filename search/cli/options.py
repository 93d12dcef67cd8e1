"""Defines the options that several commands share, loads study files by them, and prints results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from search.cli import completion

if TYPE_CHECKING:
    from search.config.study_file import StudyFile


class GivenPath(click.Path):
    """A path that is not empty: an empty one would stand for the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if value == "":
            self.fail("it is empty; name a path", param, ctx)
        return super().convert(value, param, ctx)


class GivenText(click.types.StringParamType):
    """A text that is not empty."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the text as it is."""
        if value == "":
            self.fail("it is empty; leave the option out for its default", param, ctx)
        return super().convert(value, param, ctx)


PATH = GivenPath(path_type=Path)
TEXT = GivenText()
ALL_GROUPS = ("model", "space", "methods", "evaluation", "tracking", "experiments")


class StudyCommand(click.Command):
    """Ends its help with the config groups that its KEY=VALUE words can choose from."""

    def __init__(self, *args: Any, groups: Sequence[str] = ALL_GROUPS, **options: Any) -> None:
        """Create the command; `groups` are the config groups that make a difference to it."""
        super().__init__(*args, **options)
        self.groups = groups

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the config groups and what each offers."""
        write_groups(formatter, self.groups)


def write_groups(formatter: click.HelpFormatter, shown: Sequence[str] = ALL_GROUPS) -> None:
    """Write the config groups and what each offers, as the end of a help page; groups of your own always appear."""
    from search.config import compose

    given = os.environ.get("OPTUNA_SEARCH_CONFIG_DIR")
    groups = compose.groups(Path(given) if given and Path(given).is_dir() else None)
    rows = [(group, ", ".join(names)) for group, names in groups.items() if group in shown or group not in ALL_GROUPS]
    if rows:
        with formatter.section("Config groups (GROUP=NAME; yours in ./studies or --config-dir come first)"):
            formatter.write_dl(rows)


def _choose_study(context: click.Context, parameter: click.Parameter, given: str | None) -> str | None:
    """Return the study that was named, or the only one in the user's directory, or the demo; say which it is."""
    if context.resilient_parsing:
        return given
    from search.config import compose

    source = context.get_parameter_source(str(parameter.name))
    if given is not None:
        if source == click.core.ParameterSource.ENVIRONMENT:
            click.echo(f"study: {given}, from OPTUNA_SEARCH_STUDY", err=True)
        return given
    chosen = compose.default_study(context.params.get("config_dir"))
    click.echo(f"study: {chosen.name}, {chosen.why}", err=True)
    return chosen.name


def study_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose a study file, and its overrides."""
    for option in (
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=completion.words),
        click.option(
            "--config-dir",
            type=PATH,
            envvar="OPTUNA_SEARCH_CONFIG_DIR",
            show_envvar=True,
            is_eager=True,
            help="Directory with your study files [default: ./studies where it exists].",
        ),
        click.option(
            "--study",
            type=TEXT,
            envvar="OPTUNA_SEARCH_STUDY",
            show_envvar=True,
            callback=_choose_study,
            shell_complete=completion.studies,
            help="Study file: demo, exaone4-1.2b, exaone4-1.2b-contest, or your own "
            "[default: your only one in ./studies, else demo].",
        ),
    ):
        command = option(command)
    return command


def storage_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose a study file and a study in a storage."""
    for option in (
        click.option(
            "--study-name", type=TEXT, help="Name of the study in the storage [default: the study file's study_name]."
        ),
        click.option(
            "--storage",
            type=TEXT,
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


def is_asked(key: str, overrides: tuple[str, ...]) -> bool:
    """Return whether a word of the command line sets a key of the study file, to null too."""
    return any(word.lstrip("+").startswith(f"{key}=") for word in overrides)


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
