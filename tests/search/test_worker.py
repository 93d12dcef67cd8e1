"""A worker process that can't start its work."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from search.config import validation
from tests.waiting import LONG_S

PROGRAM = """
    import sys
    from evaluator.errors import EngineOutOfMemory
    from search.study import worker

    class Full(worker.Bench):
        def baseline(self, say):
            raise EngineOutOfMemory("the GPU has 3.1 GB free, and the engine needs 9.0 GB; free some, or take another")

    worker.Bench = Full
    worker.main(1, 1)
"""


@pytest.mark.long
@pytest.mark.parametrize("source", ["model", "missing"])
def test_a_worker_that_can_not_begin_says_why_in_one_line(tmp_path, pico_llama, source):
    values = {
        "study_name": "w",
        "outputs": str(tmp_path / "outputs"),
        "storage": f"sqlite:///{tmp_path}/studies.db",
        "model": {"source": str(pico_llama if source == "model" else tmp_path / "missing")},
        "text": {"calibration": "embedded", "window": 32, "calibration_windows": 4, "shards": 4},
        "evaluation": {"backend": "transformers", "device": "cpu"},
    }
    file = validation.validate(values, "this test")
    if source == "model":
        from search.study import storage

        storage.create_or_resume(storage.open_storage(file.storage), "w", {"a": 1})
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        input=file.to_line() + "\ngo\n",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path, capture_output=True, text=True, timeout=LONG_S,
    )  # fmt: skip
    assert "Traceback" not in ended.stderr
    assert ended.returncode != 0
    event = json.loads(ended.stdout.splitlines()[-1])
    if source == "model":
        assert event == {"event": "warn", "text": "worker 1: the GPU has 3.1 GB free, and the engine needs 9.0 GB; "
                         "free some, or take another"}  # fmt: skip
    else:
        assert event["event"] in ("warn", "stopped")
        assert "missing" in event["text"]
