"""Test that files are written whole, and that a lock is held by one process at a time."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from compressors.errors import CheckpointError
from compressors.files import alone, digest_of_json, write_json, written_whole
from compressors.model.checkpoint import Checkpoint

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


def test_a_lock_is_waited_for_and_released_when_its_holder_is_killed(tmp_path):
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


def test_a_file_is_replaced_when_it_is_whole_and_not_before(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with written_whole(path) as scratch:
        scratch.write_text("ne")
        assert path.read_text() == "old"
        scratch.write_text("new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_error_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    write_json(tmp_path / "file", {"old": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file", {"new": float("nan")})
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "file"):
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == '{\n "old": 1\n}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_lock_that_can_not_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="make its directory writable"), alone(tmp_path / "file" / "made"):
        pass


def test_a_digest_depends_on_the_values_and_not_on_the_order_of_keys():
    assert digest_of_json({"b": [1, 2.5], "a": "é"}, 16) == digest_of_json({"a": "é", "b": [1, 2.5]}, 16)
    assert digest_of_json({"a": 1}, 16) != digest_of_json({"a": 2}, 16)


def test_a_digest_is_that_of_earlier_versions():
    # sha256 of '{"a": [1, 2.5], "b": null}'
    assert digest_of_json({"b": None, "a": [1, 2.5]}, 24) == "68982516a4a37116914e58df"


@pytest.mark.parametrize(("umask", "file_mode", "directory_mode"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755)])
def test_permissions_of_what_is_written_follow_the_umask(umask, file_mode, directory_mode, pico_llama, tmp_path):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "new" / "facts.json", {"a": 1})
        Checkpoint.read(pico_llama).write(tmp_path / "model")
        Checkpoint.read(pico_llama).write(tmp_path / "model")  # in place of another
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert len(modes) > 6
    for path, mode in modes.items():
        assert mode == (directory_mode if path.is_dir() else file_mode), path
