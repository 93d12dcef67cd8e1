"""The speed table on times whose true law is known."""

import dataclasses
import random

import pytest

from evaluator.speed_table import Probe, Shape, SpeedTable

BASE = Shape("bfloat16", 28, 1536, 8960, 12, 2, 128, 151936)
KERNELS = {"bfloat16": (0.10, 0.55, 2.0), "W8A8": (0.12, 0.75, 1.0), "W4A16": (0.10, 0.95, 0.5)}
NARROW = {"intermediate_size": 6144, "hidden_size": 1280, "num_attention_heads": 5, "num_key_value_heads": 1}


def true_time(shape):
    """Small kernels fill a step: a quantized layer reads fewer bytes and takes more kernels, as on an H100."""
    fixed, layer, byte = KERNELS[shape.precision]
    reads = 0.2 * shape.attention / BASE.attention + 0.8 * shape.mlp / BASE.mlp
    return fixed + 0.2 * shape.head / BASE.head + shape.num_hidden_layers / 28 * (layer + 0.17 * byte * reads)


def probe(noise=0.0, check=False, **changes):
    shape = dataclasses.replace(BASE, **changes)
    ratio = true_time(shape) / true_time(BASE) * (1 + noise)
    return Probe(shape, {1: ratio, 32: ratio}, {1: 0.004, 32: 0.004}, check)


def table(noise=0.0):
    drawn = random.Random(1)

    def one(**changes):
        return probe(drawn.gauss(0, noise), **changes)

    widths = [
        {"intermediate_size": 6144},
        {"hidden_size": 1280},
        {"num_attention_heads": 6, "num_key_value_heads": 1},
    ]
    probes = [one(num_hidden_layers=14), *(one(**width) for width in widths)]
    for precision in ("W8A8", "W4A16"):
        probes += [one(precision=precision), one(precision=precision, num_hidden_layers=14)]
        probes += [one(precision=precision, **NARROW)]
    return SpeedTable(BASE, {1: 2.0, 32: 2.4}, tuple(probes))


def unseen(count=200):
    drawn = random.Random(2)
    for _ in range(count):
        yield dataclasses.replace(
            BASE,
            precision=drawn.choice(list(KERNELS)),
            num_hidden_layers=drawn.randint(20, 28),
            intermediate_size=drawn.randrange(6144, 8961, 256),
            hidden_size=drawn.choice([1280, 1408, 1536]),
        )


@pytest.mark.parametrize(("noise", "largest"), [(0.0, 0.01), (0.005, 0.02)])
def test_unseen_plans_are_forecast_to_within_the_noise(noise, largest):
    made = table(noise)
    errors = [abs(made.time_ratio(shape)[0] - true_time(shape) / true_time(BASE)) for shape in unseen()]
    assert max(errors) < largest


@pytest.mark.parametrize(("noise", "largest"), [(0.0, 0.015), (0.005, 0.025)])
def test_a_table_of_few_probes_forecasts_unseen_plans_and_its_check_bounds_the_error(noise, largest):
    drawn = random.Random(1)
    middle = {"num_hidden_layers": 24, "intermediate_size": 7680, "hidden_size": 1408}
    changes = [{"num_hidden_layers": 20}, NARROW, {"precision": "W8A8"}, {"precision": "W4A16"}]
    few = [probe(drawn.gauss(0, noise), **each) for each in changes]
    made = SpeedTable(BASE, {1: 2.0}, (*few, probe(drawn.gauss(0, noise), True, precision="W8A8", **middle)))
    errors = [abs(made.time_ratio(shape)[0] - true_time(shape) / true_time(BASE)) for shape in unseen()]
    assert max(errors) < largest
    assert sorted(errors)[len(errors) // 2] < made.error(1)


def test_a_scheme_that_is_slower_than_the_base_model_is_forecast_slower():
    made = table()
    assert true_time(dataclasses.replace(BASE, precision="W4A16")) > true_time(BASE)
    assert made.time_ratio(dataclasses.replace(BASE, precision="W4A16"))[0] > 1.01
    assert made.time_ratio(BASE)[0] == pytest.approx(1.0, abs=0.003)


def test_the_parts_of_a_step_add_up_and_are_those_of_the_law():
    parts = table().parts(BASE, 1)
    whole = true_time(BASE)
    assert parts.total == pytest.approx(1.0, abs=0.005)
    assert parts.layers == pytest.approx(0.55 / whole, abs=0.03)
    assert parts.mlp == pytest.approx(0.8 * 0.34 / whole, abs=0.03)


def test_the_error_is_that_of_checks_which_the_fit_has_not_seen():
    exact = table().with_probe(probe(check=True, num_hidden_layers=24, intermediate_size=7424))
    wrong = table().with_probe(probe(noise=0.1, check=True, num_hidden_layers=24, intermediate_size=7424))
    assert exact.error(1) == 0.01  # that of engine processes
    assert wrong.error(1) == pytest.approx(0.1 * true_time(wrong.probes[-1].shape) / true_time(BASE), rel=0.2)


def test_a_forecast_is_no_more_certain_than_the_timings_that_it_rests_on():
    lucky = table().with_probe(probe(check=True, num_hidden_layers=24, intermediate_size=7424))
    noisy = tuple(dataclasses.replace(each, ratio_se={1: 0.08, 32: 0.002}) for each in lucky.probes)
    unsure = dataclasses.replace(lucky, probes=noisy)
    assert (unsure.error(1), unsure.error(32)) == (pytest.approx(0.08), lucky.error(32))
    shape = dataclasses.replace(BASE, num_hidden_layers=22)
    assert unsure.time_ratio(shape)[1] > 7 * lucky.time_ratio(shape)[1]


def test_a_precision_without_a_probe_scales_the_reads_alone():
    made = SpeedTable(BASE, {1: 2.0}, tuple(each for each in table().probes if each.shape.precision == "bfloat16"))
    ratio, _ = made.time_ratio(dataclasses.replace(BASE, precision="FP8_DYNAMIC"))
    parts = made.parts(BASE, 1)
    assert ratio == pytest.approx(1 - (parts.attention + parts.mlp) / 2, abs=0.01)


def test_batch_sizes_count_by_their_time_per_token():
    slow = Probe(dataclasses.replace(BASE, precision="W8A8"), {1: 1.0, 32: 3.0}, {1: 0.001, 32: 0.001})
    made = SpeedTable(BASE, {1: 2.0, 32: 6.4}, (slow,))
    ratio, _ = made.time_ratio(slow.shape)
    assert ratio == pytest.approx((2.0 * 1.0 + 0.2 * 3.0) / 2.2, abs=0.02)


def test_a_table_survives_json():
    made = table(0.01)
    assert SpeedTable.from_dict(made.to_dict()) == made
    with pytest.raises(ValueError, match="version 0"):
        SpeedTable.from_dict({**made.to_dict(), "version": 0})
