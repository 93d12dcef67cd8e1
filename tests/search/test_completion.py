"""Completion in a shell, and the study that is taken where none is named."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import get_completion_class

from search.cli import main as optuna_search

MINE = "defaults: [_base, _self_]\nstudy_name: {name}\nmodel: {{source: x}}\n"


def completed(words, incomplete):
    complete = get_completion_class("zsh")(optuna_search, {}, "optuna-search", "_OPTUNA_SEARCH_COMPLETE")
    return [item.value for item in complete.get_completions(words, incomplete)]


@pytest.mark.parametrize(
    ("words", "incomplete", "some"),
    [
        (["run"], "space.pre", {"space.precision="}),
        (["run"], "space.precision=", {"space.precision=W8A8", "space.precision=bfloat16"}),
        (["run"], "space.precision=W", {"space.precision=W8A8", "space.precision=W4A16"}),
        (["run"], "space.repair=", {"space.repair=stream", "space.repair=none"}),
        (["compress"], "compression.method=", {"compression.method=quantize"}),
        (["compress", "quantize"], "model=", {"model=smollm2-135m"}),
        (["config"], "experiments=", {"experiments=02-07_w8a8"}),
        (["run"], "tracking=", {"tracking=off", "tracking=mlflow"}),
        (["run"], "evaluation.backend=", {"evaluation.backend=vllm"}),
        (["run"], "sampler.name=", {"sampler.name=tpe"}),
        (["run"], "pruner.name=w", {"pruner.name=wilcoxon"}),
        (["run"], "evaluation.compile=", {"evaluation.compile=true", "evaluation.compile=false"}),
        (["run"], "evaluation.speed=", {"evaluation.speed=predicted"}),
        (["run"], "tr", {"trials=", "tracking=", "tracking.mlflow="}),
        (["run", "trials=3"], "evaluation.workload.", {"evaluation.workload.turns="}),
        (["run", "--study"], "", {"demo", "exaone4-1.2b"}),
        (["status", "--study"], "ex", {"exaone4-1.2b"}),
        (["run"], "--dist", {"--distill-top"}),
        ([], "comp", {"compress"}),
        (["compress", "drop-layers", "--drop-from"], "", {"kl", "importance"}),
        (["compress", "quantize", "--scheme"], "W8", {"W8A8"}),
        (["compress", "cast", "--dtype"], "", {"float16"}),
        (["run"], "nosuch=", set()),
    ],
)
def test_a_shell_completes(words, incomplete, some, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = completed(words, incomplete)
    assert some <= set(found)
    assert some or not found
    assert all(value.startswith(incomplete) for value in found)


def test_studies_and_groups_of_your_own_are_completed(tmp_path, monkeypatch):
    (tmp_path / "studies" / "space").mkdir(parents=True)
    (tmp_path / "studies" / "mine.yaml").write_text(MINE.format(name="mine"))
    (tmp_path / "studies" / "space" / "narrow.yaml").write_text("hidden_size: 8\n")
    monkeypatch.chdir(tmp_path)
    assert "mine" in completed(["run", "--study"], "")
    assert completed(["run"], "space=n") == ["space=narrow"]


@pytest.mark.parametrize(
    ("line", "at", "answers"),
    [  # bash takes `=` for a word of its own, and wants what comes after
        ("optuna-search run space.precision = W", 4, {"plain,W8A8", "plain,W4A16"}),
        ("optuna-search run space.precision =", 3, {"plain,W8A8"}),
        ("optuna-search run trials = 3 tracking = o", 7, {"plain,off"}),
        ("optuna-search run space.prec", 2, {"plain,space.precision="}),
        ("optuna-search run --study = ex", 4, {"plain,exaone4-1.2b"}),
    ],
)
def test_bash_completes_what_follows_the_equals_sign(line, at, answers, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(at))
    complete = get_completion_class("bash")(optuna_search, {}, "optuna-search", "_OPTUNA_SEARCH_COMPLETE")
    assert answers <= set(complete.complete().split("\n"))


IN_BASH = """
compopt() { echo "compopt" "$@"; }
complete() { :; }
source /dev/stdin <<< "$SOURCE"
COMP_WORDS=(optuna-search run "$1") COMP_CWORD=2
_optuna_search_completion optuna-search
printf '%s\\n' "${COMPREPLY[@]}"
"""
IN_ZSH = """
compdef() { : }
compadd() { print -r -- "compadd $*" ${(P)argv[-1]} }
eval "$SOURCE"
words=(optuna-search run "$1") CURRENT=3
_optuna_search_completion
"""


@pytest.mark.parametrize(
    ("shell", "script", "without_space"), [("bash", IN_BASH, "compopt -o nospace"), ("zsh", IN_ZSH, "-S ")]
)
def test_no_space_follows_a_key_that_waits_for_its_value(shell, script, without_space, tmp_path):
    """The shell itself runs what is sourced; what it would tell its line editor is printed."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    source = get_completion_class(shell)(optuna_search, {}, "optuna-search", "_OPTUNA_SEARCH_COMPLETE").source()
    program = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{program}:{os.environ['PATH']}", "SOURCE": source}

    def told(word):
        asked = [shell, "-c", script, shell, word]
        done = subprocess.run(asked, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    key, value = told("space.prec"), told("space=s")
    assert "space.precision=" in key
    assert without_space in key
    assert "space=smollm2-135m" in value
    assert without_space not in value


def test_the_only_study_of_your_own_is_the_default_and_is_named(cli, tmp_path):
    studies = tmp_path / "studies"
    studies.mkdir()
    assert cli("config", cwd=tmp_path).err == "study: demo, as none is named; --study names another\n"
    (studies / "mine.yaml").write_text(MINE.format(name="first"))
    (studies / "_part.yaml").write_text("trials: 3\n")
    only = cli("config", cwd=tmp_path)
    assert only.err == "study: mine, the only one in studies; --study names another\n"
    assert "study_name: first" in only.out
    (studies / "other.yaml").write_text(MINE.format(name="second"))
    several = cli("config", cwd=tmp_path)
    assert several.err == "study: demo, as none is named; studies holds mine, other: choose one with --study\n"
    assert "study_name: demo" in several.out
    assert cli("config", "--study", "other", cwd=tmp_path).err == ""


def test_the_directory_that_is_named_decides(cli, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "one.yaml").write_text(MINE.format(name="one"))
    assert "study: one" in cli("config", "--config-dir", tmp_path / "mine", cwd=tmp_path).err
    monkeypatch.setenv("OPTUNA_SEARCH_STUDY", "demo")
    assert cli("config", cwd=tmp_path).err == "study: demo, from OPTUNA_SEARCH_STUDY\n"
    refused = cli("status", "--config-dir", tmp_path / "nosuch", cwd=tmp_path)
    assert refused.status == 2
    assert "no such directory" in refused.err


def test_help_shows_the_groups_where_they_make_a_difference(cli, tmp_path):
    for words, groups in {
        ("run",): {"model", "space", "methods", "evaluation", "tracking"},
        ("compress",): {"model", "evaluation", "tracking", "experiments"},
        ("compress", "quantize"): {"model", "evaluation", "tracking"},
        ("config",): {"model", "space", "methods", "evaluation", "tracking", "experiments"},
        ("analyze",): {"model"},
        ("status",): set(),
        ("export",): set(),
    }.items():
        _, _, listed = cli(*words, "--help", cwd=tmp_path).out.partition("Config groups")
        shown = {line.split()[0] for line in listed.splitlines()[1:] if line[:3].strip()}
        assert shown == groups, words


def test_help_names_the_environment_variables_and_how_to_complete(cli, tmp_path):
    text = cli("--help", cwd=tmp_path).out
    for name in (
        "OPTUNA_SEARCH_CACHE",
        "OPTUNA_SEARCH_STUDY",
        "OPTUNA_SEARCH_CONFIG_DIR",
        "MLFLOW_TRACKING_URI",
        "PGPASSWORD",
    ):
        assert name in text
    for shell in ("bash", "zsh", "fish"):
        assert f"_OPTUNA_SEARCH_COMPLETE={shell}_source optuna-search" in text


def options(command, path=""):
    for name, below in getattr(command, "commands", {}).items():
        yield from options(below, f"{path} {name}".strip())
    yield from ((path, one) for one in command.params if isinstance(one, click.Option) and not one.is_flag)


@pytest.mark.parametrize(("path", "option"), options(optuna_search))
def test_every_option_that_takes_a_value_says_its_default(path, option):
    assert option.required or option.show_default or "[default: " in option.help
