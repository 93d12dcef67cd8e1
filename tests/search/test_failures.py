"""A trial whose engine hangs or runs out of memory is recorded with its reason, and the study continues.

The engines are real processes, and they are really stopped and killed.
"""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from optuna.trial import TrialState

from evaluator.process import EngineProcess
from search.config import validation
from search.study import status, workers


@pytest.fixture
def file(tmp_path, pico_llama):
    values = {
        "study_name": "failures",
        "trials": 4,
        "outputs": str(tmp_path / "outputs"),
        "storage": f"sqlite:///{tmp_path}/studies.db",
        "model": {"source": str(pico_llama)},
        "space": {"precision": ["bfloat16", "float16", "float32", "W8A8"]},  # the first four trials, one each
        "text": {"window": 32, "calibration_windows": 4, "shards": 4},
        "evaluation": {"backend": "transformers", "device": "cpu", "speed": "predicted", "call_timeout_s": 10.0},
        "pruner": {"name": "none"},
        "tracking": {"mlflow": False},
    }
    return validation.validate(values, "this test")


@pytest.mark.long
def test_a_hanging_engine_and_one_without_memory_fail_only_their_trials(file, monkeypatch):
    # trial 0 is the base model itself, and needs no engine; a killed one is started again
    strikes = iter([signal.SIGSTOP, signal.SIGKILL, signal.SIGKILL, None])
    struck = []
    nll = EngineProcess.nll

    def strike_first(self, windows):
        if self.path.parent.name == "checkpoints" and self.pid not in struck:  # a candidate's first call
            struck.append(self.pid)
            signal_number = next(strikes)
            if signal_number is not None:
                os.kill(self.pid, signal_number)
        return nll(self, windows)

    monkeypatch.setattr(EngineProcess, "nll", strike_first)
    study = workers.run_study(file)
    trials = study.get_trials()
    assert [trial.state for trial in trials] == [
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]
    hung, starved = trials[1].user_attrs, trials[2].user_attrs
    assert (hung["failure"], hung["stage"]) == ("EngineTimeout", "measure")
    assert "took longer than 10 s" in hung["reason"]
    assert (starved["failure"], starved["stage"]) == ("EngineOutOfMemory", "measure")
    assert "memory" in starved["reason"]
    for pid in struck:
        assert not Path(f"/proc/{pid}").exists()
    shown = {trial.trial: trial for trial in status.of(study).ended}
    assert "took longer" in shown[1].reason


@pytest.mark.long
def test_ctrl_c_during_an_import_ends_with_status_130(tmp_path):
    """CPython remembers a KeyboardInterrupt that passed through an exec() of text, and would end with the signal."""
    (tmp_path / "interrupted.py").write_text(
        textwrap.dedent("""
            from search import cli, doctor

            def examine():
                exec("raise KeyboardInterrupt")  # as inside a dataclass decorator

            doctor.examine = examine
            cli.main(["doctor"])
        """)
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    ended = subprocess.run([sys.executable, "-m", "interrupted"], env=environment, capture_output=True, text=True)
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr.strip() == "stopped; run the same command again to resume"
