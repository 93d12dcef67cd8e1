"""One process at a time, and a killed one holds up nobody."""

import os
import signal
import subprocess
import sys

import pytest

from compressors.errors import CheckpointError
from compressors.files import alone

HOLDS = """
import pathlib, sys, time
from compressors.files import alone
with alone(pathlib.Path(sys.argv[1])):
    print("inside", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holding(path, seconds):
    command = [sys.executable, "-c", HOLDS, str(path), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_the_second_waits_until_the_first_was_killed(tmp_path):
    with holding(tmp_path / "made", 600) as first:
        assert first.stdout.readline() == "inside\n"
        with holding(tmp_path / "made", 0) as second:
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(2)
            with alone(tmp_path / "another"):
                pass
            os.kill(first.pid, signal.SIGKILL)
            assert second.wait(30) == 0
            assert second.stdout.read() == "inside\n"


def test_a_place_that_can_not_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="make its directory writable"), alone(tmp_path / "file" / "made"):
        pass
