"""A base model that takes longer than when it was measured alone gets a fresh process, and is then believed."""

import dataclasses

import pytest

from evaluator import speed
from search.config import validation
from search.setup import setting as settings
from search.stages.bench import Bench


@pytest.mark.long
def test_a_slow_base_model_gets_a_fresh_process_and_is_then_believed(tmp_path, pico_llama, monkeypatch):
    monkeypatch.setattr(speed, "SURE", 0.0)  # on a busy machine the error of so few turns may exceed any difference
    values = {
        "study_name": "slow",
        "outputs": str(tmp_path / "outputs"),
        "model": {"source": str(pico_llama)},
        "text": {"calibration": "embedded", "window": 32, "shards": 2, "report": None},
        "evaluation": {"backend": "transformers", "device": "cpu", "workload": {"decode_steps": 4, "turns": 4}},
        "tracking": {"mlflow": False},
    }
    setting = settings.prepare(validation.validate(values, "this test"))
    with Bench.of(setting) as bench:
        base = bench.baseline(lambda text: None)
        faster = dataclasses.replace(base, time_per_token_ms=base.time_per_token_ms / 100)  # as it was measured once

        def measured():
            told = []
            found = bench.measure(setting.model.path, base.weights_sha256, faster, told.append)
            noted = sum("more time beside it than when it was measured alone" in note for note in found.notes)
            return found, sum(text.endswith("a fresh process of it") for text in told), noted

        before = bench.engines.baseline()
        slow, replaced, noted = measured()
        assert (replaced, noted) == (1, 1)
        assert not before.alive
        assert bench.engines.base_ms == slow.base_time_per_token_ms
        bench.engines.base_ms *= 100  # or the machine's noise might decide
        then, replaced, noted = measured()
        assert (replaced, noted) == (0, 1)
        assert bench.engines.base_ms == then.base_time_per_token_ms
        faster = dataclasses.replace(base, time_per_token_ms=base.time_per_token_ms * 100)
        _, replaced, noted = measured()
        assert (replaced, noted) == (0, 0)
