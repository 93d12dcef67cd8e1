"""Test GPTQ against a plain implementation, and on inputs that are dead, too few, or a thousand times the others."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from compressors.errors import CheckpointError
from compressors.methods import rounding
from compressors.methods.quantizers import gptq

SCHEMES = {"W4A16": 32, "W8A8": None, "FP8_DYNAMIC": None}


def correlated(inputs, rows=64, tokens=2000, seed=0):
    """(weight [N, K] in bfloat16, x [T, K]): inputs that share a few causes, of unequal size."""
    random = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, inputs // 6, generator=random)
    x = causes @ torch.randn(inputs // 6, inputs, generator=random) + torch.randn(tokens, inputs, generator=random)
    x = x * (torch.rand(inputs, generator=random) * 3 + 0.1)
    return torch.randn(rows, inputs, generator=random).bfloat16(), x


def moment_of(x):
    return x.T @ x / len(x)


def lost(weight, rounded, moment):
    error = rounding.multiplied_out(*rounded) - weight.float()
    return float(((error @ moment) * error).sum())


def nearest(weight, scheme, size, scales):
    return rounding.nearest(weight, scales, scheme), scales


def by_the_paper(weight, damped, scheme, size, scales):
    """Round one column at a time, and invert again what remains after each."""
    order = sorted(range(len(damped)), key=lambda k: -float(damped[k, k]))
    rest, values = weight.double(), torch.zeros(weight.shape)
    for done, k in enumerate(order):
        left = order[done:]
        inverse = torch.linalg.inv(damped[left][:, left])
        scale = scales[:, k // (size or len(order))].double()
        values[:, k] = rounding.to_grid(rest[:, k].float() / scale.float(), scheme)
        error = (rest[:, k] - values[:, k] * scale) / inverse[0, 0]
        rest[:, left] -= error[:, None] * inverse[0]
    return values


@pytest.mark.parametrize("inputs", [32, 160])  # within a block, and over its end
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_what_the_paper_says(scheme, inputs):
    size = SCHEMES[scheme]
    weight, x = correlated(inputs)
    values, scales = gptq.gptq(weight, moment_of(x), scheme, size)
    expected = by_the_paper(weight, gptq.damp(moment_of(x)), scheme, size, scales)
    assert (values == expected).float().mean() > 0.97  # a tie falls either way, and what comes after it too
    assert lost(weight, (values, scales), moment_of(x)) == pytest.approx(
        lost(weight, (expected, scales), moment_of(x)), rel=0.02
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_loses_less_than_the_nearest_on_inputs_that_it_has_and_has_not_seen(scheme):
    size = SCHEMES[scheme]
    weight, x = correlated(192, tokens=4000)
    seen, unseen = moment_of(x[:2000]), moment_of(x[2000:])
    made = gptq.gptq(weight, seen, scheme, size)
    for scales in (made[1], rounding.largest_scales(weight, scheme, size)):
        other = nearest(weight, scheme, size, scales)
        assert lost(weight, made, seen) < 0.8 * lost(weight, other, seen)
        assert lost(weight, made, unseen) < 0.8 * lost(weight, other, unseen)


def test_independent_inputs_leave_nothing_to_make_good():
    weight, _ = correlated(96)
    for moment in (torch.eye(96), torch.diag(torch.rand(96) + 0.1)):
        values, scales = gptq.gptq(weight, moment, "W4A16", 32)
        assert torch.equal(values, rounding.nearest(weight, scales, "W4A16"))


def test_the_input_of_the_largest_square_goes_first():
    weight, x = correlated(96)
    x[:, 70] *= 50
    values, scales = gptq.gptq(weight, moment_of(x), "W4A16", 32)
    expected = rounding.nearest(weight, scales, "W4A16")
    assert torch.equal(values[:, 70], expected[:, 70])  # nobody's error was passed on to it
    assert not torch.equal(values[:, 0], expected[:, 0])


def test_groups_and_scales_are_those_of_the_original_order():
    weight, x = correlated(96)
    weight[:, 32:64] *= 100
    values, scales = gptq.gptq(weight, moment_of(x), "W4A16", 32)
    importance = gptq.damp(moment_of(x)).diagonal()
    assert torch.equal(scales, rounding.searched_scales(weight, "W4A16", 32, importance))
    assert scales.shape == (64, 3)
    assert scales.dtype == torch.bfloat16
    assert (scales[:, 1] > 20 * scales[:, 0]).all()
    assert values.abs().max() <= 8
    given = rounding.largest_scales(weight, "W4A16", 32)
    assert torch.equal(gptq.gptq(weight, moment_of(x), "W4A16", 32, scales=given)[1], given)


def test_too_few_tokens_and_dead_inputs():
    weight, x = correlated(128, tokens=20)  # of rank 20
    x[:, [3, 40]] = 0
    for diagonal, median in ((gptq.DIAGONAL, gptq.MEDIAN), (0.0, 0.0)):
        values, scales = gptq.gptq(weight, moment_of(x), "W4A16", 32, diagonal=diagonal, median=median)
        assert torch.isfinite(values).all()
        assert torch.isfinite(scales.float()).all()
        assert torch.equal(values[:, [3, 40]], rounding.nearest(weight, scales, "W4A16")[:, [3, 40]])
    one_token = gptq.gptq(weight, torch.outer(x[0], x[0]), "W4A16", 32)
    assert torch.isfinite(rounding.multiplied_out(*one_token)).all()
    values, scales = gptq.gptq(weight, torch.zeros(128, 128), "W4A16", 32)
    assert torch.equal(values, rounding.nearest(weight, scales, "W4A16"))


def test_few_tokens_do_not_lead_it_astray():
    """Fitted to 40 tokens of 192 inputs, it must not lose more than the nearest on others."""
    weight, x = correlated(192, tokens=4000)
    values, scales = gptq.gptq(weight, moment_of(x[:40]), "W4A16", 32)
    other = nearest(weight, "W4A16", 32, scales)
    assert lost(weight, (values, scales), moment_of(x[40:])) < lost(weight, other, moment_of(x[40:]))


@pytest.mark.parametrize("what", ["a token", "a token in a few channels", "two tokens"])
def test_tokens_that_hold_nearly_all_of_the_trace_spoil_no_other(what):
    weight, x = correlated(192)
    ordinary = moment_of(x)
    massive = 30 * len(x) ** 0.5 * torch.randn(2, 192, generator=torch.Generator().manual_seed(1)) * x.std(0)
    if what == "a token in a few channels":
        massive[:, 5:] /= 1000
        massive[:, :5] *= 30
    x[[7, 9] if what == "two tokens" else [7]] = massive if what == "two tokens" else massive[:1]
    assert moment_of(x).trace() > 15 * ordinary.trace()
    made = gptq.gptq(weight, moment_of(x), "W4A16", 32)
    assert lost(weight, made, ordinary) < 0.3 * lost(weight, nearest(weight, "W4A16", 32, made[1]), ordinary)
    assert lost(weight, made, ordinary) < 2 * lost(weight, gptq.gptq(weight, ordinary, "W4A16", 32), ordinary)


def test_a_channel_that_holds_nearly_all_of_the_trace():
    weight, x = correlated(192, tokens=4000)
    x[:, 5] *= 2000
    seen, unseen = moment_of(x[:2000]), moment_of(x[2000:])
    made = gptq.gptq(weight, seen, "W4A16", 32)
    assert lost(weight, made, unseen) < lost(weight, nearest(weight, "W4A16", 32, made[1]), unseen)
    largest = rounding.largest_scales(weight, "W4A16", 32)
    assert lost(weight, made, unseen) < 0.2 * lost(weight, nearest(weight, "W4A16", 32, largest), unseen)
    error = (rounding.multiplied_out(*made) - weight.float()).abs()
    assert error.mean() < 3 * (rounding.multiplied_out(*nearest(weight, "W4A16", 32, largest)) - weight).abs().mean()


def test_damping_is_by_each_input_and_by_an_ordinary_one():
    moment = torch.eye(9) * torch.tensor([4.0, 9.0, 0.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0])
    moment[0, 1] = moment[1, 0] = 2
    damped = gptq.damp(moment, 0.25, 0.5)
    expected = torch.diag(moment.diagonal() + 5 * 0.5)  # 5 is the median of the live ones
    expected[2, 2] = 5 + 5 * 0.5
    expected[0, 1] = expected[1, 0] = 1.5
    torch.testing.assert_close(damped, expected.double())
    with pytest.raises(CheckpointError, match="NaN"):
        gptq.damp(torch.full((2, 2), torch.nan))


def test_massive_directions_are_split_off_and_limited():
    _, x = correlated(48)
    ordinary = moment_of(x).double()
    rest, massive = gptq.split(ordinary)
    assert torch.equal(rest, ordinary)
    assert not massive.any()
    directions = torch.linalg.qr(torch.randn(48, 2, generator=torch.Generator().manual_seed(3)).double()).Q
    for times, limited in ((5, 5), (1000, gptq.MOST)):
        added = times * float(ordinary.trace()) * directions @ directions.T
        rest, massive = gptq.split(ordinary + added)
        assert float(rest.trace()) == pytest.approx(float(ordinary.trace()), rel=0.1)
        assert float(massive.trace()) == pytest.approx(2 * limited * float(ordinary.trace()), rel=0.1)


def test_the_factor_is_of_the_inverse():
    _, x = correlated(48)
    moment = moment_of(x).double()
    factor = gptq.inverse_factor(moment)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(moment), rtol=1e-6, atol=1e-9)
    assert torch.isfinite(gptq.inverse_factor(torch.ones(48, 48).double())).all()  # of rank 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_finds_the_same(scheme):
    """Blocks of columns are rounded by one kernel there."""
    size = SCHEMES[scheme]
    for seed in range(2):
        weight, x = correlated(320, seed=seed)
        values, scales = gptq.gptq(weight, moment_of(x), scheme, size)
        there, its_scales = gptq.gptq(weight.cuda(), moment_of(x).cuda(), scheme, size)
        assert torch.equal(its_scales.cpu(), scales)
        assert (there.cpu() == values).float().mean() > 0.97  # a tie falls either way
        assert lost(weight, (there.cpu(), scales), moment_of(x)) == pytest.approx(
            lost(weight, (values, scales), moment_of(x)), rel=0.02
        )


INTERPRETED = """
import torch
from compressors.methods import gptq_kernel
from compressors.methods.quantizers import gptq

torch.manual_seed(0)
for scheme, largest in (("W8A8", 127.5), ("W4A16", 7.5), ("FP8_DYNAMIC", 448.0)):
    x = torch.randn(300, 16, dtype=torch.float64)
    factor = gptq.inverse_factor(x.T @ x / 300).float()
    columns = torch.randn(16, 70) * torch.logspace(-4, 0, 70)  # 70 outputs are no multiple of a program's
    columns[3, 5] = 0.0
    scales = (columns.abs().amax(0) * 0.9 / largest).expand(16, 70)  # what is above the grid's largest is cut off
    values, errors = gptq._block(columns, scales, factor, scheme)
    found, its = gptq_kernel.block(columns, scales, factor, scheme)
    assert torch.equal(found, values), scheme
    torch.testing.assert_close(its, errors, rtol=1e-4, atol=1e-7)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_the_kernel_for_gpus_is_the_same_arithmetic():
    """Triton's interpreter runs it without a GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert ran.stdout == "equal\n", ran.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs there")
def test_where_the_kernel_can_not_run_a_warning_says_so_and_torch_rounds(caplog):
    gptq._kernel.cache_clear()
    assert gptq._kernel(torch.device("cpu")) is gptq._block
    assert "takes several times as long: Triton: " in caplog.text
