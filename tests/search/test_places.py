"""Tests of directories that are written atomically."""

import os
import subprocess
import sys

from search import files


def test_directories_of_killed_writers_are_deleted_and_those_of_living_ones_stay(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    live = os.getppid()
    left = [f".m.compress-{ended.pid}", f".m.compress-{ended.pid}-old", f"..m.compress-{ended.pid}.ab12"]
    stay = [f".m.compress-{live}", f"..m.compress-{live}.ab12", f".n.compress-{ended.pid}"]
    for name in (*left, *stay):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"0" * 100)
    with files.atomic_directory(tmp_path / "m", "compress") as scratch:
        scratch.mkdir()
        (scratch / "config.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*stay, "m"])
