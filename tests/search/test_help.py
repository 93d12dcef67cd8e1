"""The help texts of all commands and options, held to the same form."""

import re

import click
import pytest

from search.cli import main as optuna_search
from search.cli.compress import BY_CONFIG

NEVER = ("beside", "anew", "so many", "go on")
UNCLEAR_STARTS = ("Of ", "So many", "Another")
NO_VERBS = (
    "A",
    "An",
    "The",
    "This",
    "Of",
    "What",
    "How",
)  # a first line that begins so describes and does not instruct


def commands(command, path):
    if not isinstance(command, click.Group) or command.params:
        yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, f"{path} {name}")


COMMANDS = dict(commands(optuna_search, "optuna-search"))
OPTIONS = {
    f"{path} {parameter.opts[-1]}": parameter.help
    for path, command in COMMANDS.items()
    for parameter in command.params
    if isinstance(parameter, click.Option)
}


def test_every_command_and_option_is_found():
    assert {"optuna-search run", "optuna-search compress quantize", "optuna-search report"} <= COMMANDS.keys()
    assert {
        "optuna-search --verbose",
        "optuna-search run --trials",
        "optuna-search compress cast --dtype",
    } <= OPTIONS.keys()


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_says_briefly_what_its_value_is(option):
    text = OPTIONS[option]
    assert text, "has no help text"
    assert text[0].isupper() or re.match(r"[a-z]+_[a-z]+ ", text), "begins with no capital letter"  # or a key's name
    assert text.endswith((".", "]")), "does not end with a period or its default"
    assert len(text.split()) <= 25, "has more than 25 words"
    assert not text.startswith(UNCLEAR_STARTS)


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_begins_with_what_to_do(path):
    first = COMMANDS[path].help.strip().splitlines()[0]
    word = first.split()[0]
    assert word[0].isupper()
    assert word not in NO_VERBS
    assert not word.endswith("s"), "describes, and does not instruct"
    assert first.endswith(".") or "→" in first


@pytest.mark.parametrize(
    "path", [path for path, command in COMMANDS.items() if command.params and BY_CONFIG not in path]
)
def test_a_command_with_options_shows_an_example_of_itself(path):
    lines = [line.strip() for line in COMMANDS[path].help.splitlines()]
    assert any(line.startswith(path) for line in lines), f"no line begins with {path}"


@pytest.mark.parametrize(("name", "text"), [*OPTIONS.items(), *((path, one.help) for path, one in COMMANDS.items())])
def test_no_help_text_has_a_word_that_a_newcomer_stumbles_over(name, text):
    for word in NEVER:
        assert not re.search(rf"\b{word}\b", text), f"{name}: {word}"
