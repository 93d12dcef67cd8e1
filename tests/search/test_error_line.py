"""Test that errors become one short line, also where the memory is exhausted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from search.cli.error_line import line_of, memory_line

ROOT = Path(__file__).parents[2]


def test_a_line_is_short_printable_and_keeps_both_ends():
    text = line_of(ValueError("begin\n\x1b[2J\udcff" + "x" * 100_000 + "end"))
    assert text.startswith(r"begin \x1b[2J\udcff")
    assert text.endswith("end")
    assert len(text) < 2100
    assert "characters left out" in text
    assert line_of(KeyError()) == "KeyError"
    assert line_of(ValueError("한국어 é – ok")) == "한국어 é – ok"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_exhausted_memory_is_known_by_what_its_errors_say(error):
    assert "memory that this process may use is exhausted" in memory_line(error)
    wrapped = ModuleNotFoundError("Could not import module 'AutoTokenizer'")  # as transformers does
    wrapped.__context__ = error
    assert memory_line(wrapped)


def test_other_errors_are_not_taken_for_exhausted_memory():
    for error in (ValueError("cannot allocate memory"), OSError(2, "No such file"), ImportError("No module named x")):
        assert memory_line(error) is None


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("words", [["doctor"], ["status", "--plot", "front.png"]])
def test_a_limit_of_400_mb_ends_in_one_line(words, tmp_path):
    ended = subprocess.run(
        ["bash", "-c", 'ulimit -v 400000; exec "$@"', "-", sys.executable, "-m", "search.cli", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode in (1, 2)
    assert "Traceback" not in ended.stderr
    said = [line for line in ended.stderr.splitlines() if not line.startswith("study: ")]
    assert len(said) == 1
    assert said[0].startswith("optuna-search: the memory that this process may use is exhausted (")
