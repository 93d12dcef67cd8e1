import math

import pytest
import torch

from evaluator import quality
from evaluator.errors import TextError
from evaluator.quality import Reference


def plain_nll(model, window):
    """Token by token over growing prefixes, in float64: shares no code with what is tested."""
    found = []
    with torch.no_grad():
        for t in range(1, len(window)):
            logits = model(torch.tensor([window[:t]])).logits[0, -1].double()
            found.append(float(logits.logsumexp(0) - logits[window[t]]))
    return found


def test_nll_is_that_of_a_plain_loop(tiny_model, shards, monkeypatch):
    monkeypatch.setattr(quality, "CHUNK", 7)  # no divisor of 23
    for window in shards[0]:
        found = quality.window_nll(tiny_model, window)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(plain_nll(tiny_model, window), rel=1e-4)


def test_a_window_of_one_token_is_refused(tiny_model):
    with pytest.raises(TextError, match="predicts nothing"):
        quality.window_nll(tiny_model, [1])


def test_a_model_agrees_with_itself(tiny_model, shards):
    reference = Reference.of(tiny_model, shards, max_bytes=10**8)
    for index, shard in enumerate(shards):
        found = quality.shard_quality(tiny_model, shard, reference, index)
        assert found.nll == pytest.approx(reference.nll[index])
        assert found.tokens == 46
        assert 0.0 <= found.kl < 1e-5
        assert found.agreement > 0.97  # float16 makes a tie now and then


@torch.no_grad()
def test_kl_is_the_textbook_formula(tiny_model, shards):
    """The reference of another shard stands in for another model."""
    reference = Reference.of(tiny_model, shards, max_bytes=10**8)
    moved = Reference(reference.nll, reference.log_probs[1:])
    found = quality.shard_quality(tiny_model, shards[0], moved, 0)

    def distributions(windows):
        return torch.cat([tiny_model(torch.tensor([w])).logits[0, :-1].double().softmax(-1) for w in windows])

    p, q = distributions(shards[1]), distributions(shards[0])  # (positions, V)
    assert found.kl == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), rel=1e-3)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_the_reference_keeps_to_its_bytes(tiny_model, shards):
    of_one = 46 * 160 * 2
    reference = Reference.of(tiny_model, shards, max_bytes=2 * of_one + 1)
    assert len(reference.nll) == 4
    assert [kept.shape for kept in reference.log_probs] == [(46, 160)] * 2
    assert sum(kept.nbytes for kept in reference.log_probs) == 2 * of_one
    assert quality.shard_quality(tiny_model, shards[3], reference, 3).kl is None


def test_a_broken_models_nan_is_passed_on(tiny_model, shards):
    broken = type(tiny_model)(tiny_model.config).eval()
    broken.lm_head.weight.data.fill_(float("nan"))
    assert math.isnan(quality.shard_quality(broken, shards[0]).nll)


def test_perplexity_overflows_to_infinity():
    assert quality.perplexity(0.0) == 1.0
    assert quality.perplexity(1e6) == math.inf
