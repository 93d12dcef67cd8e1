"""The command line in this process: as fast as it gets, for what needs no process of its own."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner


@dataclass
class Ended:
    status: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def a_few_tokens_are_distilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a few thousand weights learns for a second."""
    for name in ("TOKENS", "TOKENS_ON_GPU"):
        monkeypatch.setattr(f"compressors.distillation.repair.{name}", 16_384)


@pytest.fixture
def cli(monkeypatch) -> Callable[..., Ended]:
    """optuna-search WORDS… in the directory `cwd`."""
    from search import cli as commands

    def call(*words: object, cwd: Path) -> Ended:
        monkeypatch.chdir(cwd)
        environment = dict(os.environ)
        try:
            result = CliRunner().invoke(commands.main, [str(word) for word in words], catch_exceptions=False)
        finally:  # MLflow puts its store there, and .env is read into it: of no concern to the next call
            os.environ.clear()
            os.environ.update(environment)
        return Ended(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture
def refused(cli) -> Callable[..., str]:
    """One clear line on standard error, nothing on standard output, and nothing written."""

    def call(*words: object, cwd: Path, status: int = 2) -> str:
        before = _files(cwd)
        ended = cli(*words, cwd=cwd)
        assert ended.status == status, ended.err
        assert ended.out == ""
        said = [line for line in ended.err.splitlines() if re.match(r"(optuna-search|Error): ", line)]
        assert len(said) == 1, ended.err
        assert _files(cwd) == before
        return said[0]

    return call


def _files(folder: Path) -> list[Path]:
    """Return what is in a folder but for SQLite's own files, which come and go with a connection."""
    return sorted(path for path in folder.rglob("*") if not path.name.endswith(("-shm", "-wal", "-journal")))
