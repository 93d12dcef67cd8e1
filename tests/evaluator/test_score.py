import dataclasses
import json
import math

import pytest

from evaluator.errors import NotFinite
from evaluator.measurement import Measurement, Workload
from evaluator.score import Formula, score_of, standard_error

BASELINE = Measurement(
    perplexity=math.exp(2.0),
    nll_nats_per_token=2.0,
    nll_nats_per_token_se=0.25,
    tokens=400,
    shard_nll=(1.5, 2.5, 1.75, 2.25),
    time_per_token_ms=4.0,
    time_per_token_ms_se=0.1,
    base_time_per_token_ms=4.0,
    base_time_per_token_ms_se=0.1,
    time_ratio=1.0,
    time_ratio_se=0.02,
    timing_samples=192,
    tokens_per_sec=250.0,
    model_size_mb=1.5,
    total_parameters=7,
    number_of_layers=2,
    number_of_heads=4,
    hidden_dim=64,
    backend="transformers",
    engine_version="transformers 5",
    transformers_version="5",
    torch_version="2",
    device="cpu",
    dtype="float32",
    workload=Workload(batch_sizes=(1, 4)),
    text_digest="t",
    logits_sha256="l",
    weights_sha256="w",
    seconds={"nll": 1.0},
    notes=("note",),
)


def measured(gain: float = 0.0, ratio: float = 1.0, spread: float = 0.0) -> Measurement:
    return dataclasses.replace(
        BASELINE,
        nll_nats_per_token=2.0 - gain,
        shard_nll=tuple(
            nll - gain + spread * sign for nll, sign in zip(BASELINE.shard_nll, (1, -1, 1, -1), strict=True)
        ),
        time_ratio=ratio,
    )


def test_a_measurement_survives_json():
    assert Measurement.from_dict(json.loads(json.dumps(BASELINE.to_dict()))) == BASELINE


def test_the_baseline_scores_one_half():
    score = score_of(BASELINE, BASELINE, Formula())
    assert (score.perf_norm, score.speed_norm, score.score) == (1.0, 0.0, 0.5)
    assert score.score_se == pytest.approx(0.01)


def test_the_manuals_28_layers():
    score = score_of(measured(gain=-math.log(3797 / 2660), ratio=1 - 0.182), BASELINE)
    assert score.perf_norm == pytest.approx(0.700, abs=1e-3)
    assert score.score == pytest.approx(0.441, abs=1e-3)


def test_the_error_is_paired():
    """A difference that all shards share has no error, however far the shards lie apart."""
    assert score_of(measured(gain=0.1), BASELINE).perf_norm_se == pytest.approx(0.0, abs=1e-12)
    noisy = score_of(measured(spread=0.01), BASELINE)
    assert noisy.perf_norm_se == pytest.approx(standard_error([0.01, -0.01, 0.01, -0.01]))


def test_weights_and_the_floor_at_zero():
    score = score_of(measured(gain=-5.0, ratio=3.0), BASELINE, Formula(0.5, 0.5))
    assert score.score == 0.0
    assert score_of(measured(ratio=0.5), BASELINE, Formula(0.0, 1.0)).score == 0.5


@pytest.mark.parametrize("bad", [measured(gain=math.nan), measured(ratio=math.inf), measured(gain=1e4)])
def test_not_finite(bad):
    with pytest.raises(NotFinite):
        score_of(bad, BASELINE)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="same text"):
        score_of(dataclasses.replace(BASELINE, text_digest="other"), BASELINE)


@pytest.mark.parametrize("wrong", [{"batch_sizes": ()}, {"batch_sizes": (0,)}, {"turns": 1}, {"prompt_tokens": 0}])
def test_workloads_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="workload"):
        Workload(**wrong)
