"""Defines the commands that show the configuration and the machine."""

from __future__ import annotations

import json
from pathlib import Path

import click

from search.cli.main import main
from search.cli.options import StudyCommand, json_option, study_options


@main.command("config", cls=StudyCommand)
@study_options
def config_command(study: str, config_dir: Path | None, overrides: tuple[str, ...]) -> None:
    """Print the composed configuration with all its keys, as YAML.

    \b
    optuna-search config --study exaone4-1.2b text.window=512
    """
    from search.config import compose

    click.echo(compose.as_yaml(study, overrides, config_dir), nl=False)


@main.command("doctor")
@json_option()
def doctor_command(as_json: bool) -> None:
    """Show what this machine can do: GPU, engines, versions, memory, disk.

    \b
    optuna-search doctor
    """
    from search import doctor

    report = doctor.examine()
    if as_json:
        click.echo(json.dumps(report))
        return
    for name, value in report.items():
        if isinstance(value, dict):
            click.echo(f"{name}:")
            for key, one in value.items():
                text = ", ".join(map(str, one)) or "none" if isinstance(one, list | tuple) else one
                click.echo(f"  {key:<20} {text if text is not None else '–'}")
        else:
            click.echo(f"{name:<22} {value if value is not None else '–'}")
