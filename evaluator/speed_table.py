"""A speed table forecasts the time of a decode step from a model's shape, by a few timings on the same machine.

Time depends on shapes and kernels, not on the weights' values. A step of batch size b is taken as

    t_b = max(host_b, fixed + head · V·d + L · (layer_p + attention_p · A + mlp_p · M))

for precision p (what is fixed and the head stay in 16 bits), L layers, hidden size d, vocabulary V, and A and M the
parameters of one layer's attention and MLP. An engine that schedules the next step while the device computes takes at
least the host's time: on an H200, 14 of 28 layers of a 1.5B model take 69% of the time at batch 1, and 92% at batch 32.
The coefficients are 0 or more, and come from least squares over the probes (Lawson and Hanson 1974, Solving Least
Squares Problems, chapter 23), without those that the host holds up. A weak prior ties each precision to the first one,
whose reads of weights it scales by their bytes; the attention more than the MLP, since it has fewer weights. It decides
only what the probes leave open. The error is that of probes that were left out of the fit, see `Probe.check`.

All times are relative to the baseline's step of the same batch size, with which every probe is timed in turn.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

VERSION = 2
PRIOR = 0.02  # the weight of the prior next to a probe's
PRIORS = (1.0, 5.0, 5.0)  # layers, attention, mlp: what is not the reading of weights differs most
WEIGHT_BYTES = {"float32": 4.0, "W8A8": 1.0, "FP8_DYNAMIC": 1.0, "W4A16": 0.5}  # others: 2
EACH_WAITING = 1.0  # what taking a probe to wait for the host has to gain, in squared standard errors
NOISE = 0.01  # the least standard error that is believed: engine processes of one model differ by about this


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the time of a decode step depends on.

    Attributes:
        precision: The dtype, or the compressed-tensors scheme.
        num_hidden_layers: The number of layers.
        hidden_size: The width of the residual stream.
        intermediate_size: The width of the MLP.
        num_attention_heads: The number of query heads.
        num_key_value_heads: The number of key/value heads.
        head_dim: The size of a head.
        vocab_size: The number of tokens of the vocabulary.
    """

    precision: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @property
    def attention(self) -> int:
        """The parameters of one layer's attention."""
        return self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)

    @property
    def mlp(self) -> int:
        """The parameters of one layer's gated MLP."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def head(self) -> int:
        """The parameters of the lm_head."""
        return self.vocab_size * self.hidden_size


@dataclasses.dataclass(frozen=True)
class Probe:
    """A model that was timed in turn with the baseline.

    Attributes:
        shape: The model's shape.
        ratio: The time of a step over the baseline's, by batch size.
        ratio_se: The standard errors.
        check: Whether the fit could do without it, so that its error when it is left out is that of a forecast.
    """

    shape: Shape
    ratio: Mapping[int, float]
    ratio_se: Mapping[int, float]
    check: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the probe as JSON values."""
        return {
            "shape": dataclasses.asdict(self.shape),
            "ratio": {str(size): value for size, value in self.ratio.items()},
            "ratio_se": {str(size): value for size, value in self.ratio_se.items()},
            "check": self.check,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Probe:
        """Return the probe that `to_dict` wrote."""
        return cls(
            Shape(**values["shape"]),
            {int(size): float(value) for size, value in values["ratio"].items()},
            {int(size): float(value) for size, value in values["ratio_se"].items()},
            bool(values["check"]),
        )


@dataclasses.dataclass(frozen=True)
class Parts:
    """Where the time of a decode step goes, as shares of the baseline's step.

    Attributes:
        fixed: What neither layers nor weights account for.
        layers: What every layer takes whatever its width: kernels and the host.
        attention: What grows with the attention's parameters.
        mlp: What grows with the MLP's parameters.
        head: What grows with the lm_head's parameters.
        host: What the host takes for a step while the device computes; 0 where no probe shows it.
    """

    fixed: float
    layers: float
    attention: float
    mlp: float
    head: float
    host: float = 0.0

    @property
    def device(self) -> float:
        """The device's time over the baseline's step."""
        return self.fixed + self.layers + self.attention + self.mlp + self.head

    @property
    def total(self) -> float:
        """The time of the step over the baseline's."""
        return max(self.device, self.host)


@dataclasses.dataclass(frozen=True)
class SpeedTable:
    """Probes of one base model on one machine with one engine, and the fit to them.

    Attributes:
        base: The base model's shape.
        base_ms: The base model's milliseconds for a decode step, by batch size.
        probes: The timed models; the base model itself, whose ratio is 1, is none of them.
    """

    base: Shape
    base_ms: Mapping[int, float]
    probes: tuple[Probe, ...]

    def time_ratio(self, shape: Shape) -> tuple[float, float]:
        """Return (time per token over the baseline's, its standard error); over several batch sizes of the mean time.

        Precisions that no probe has are taken as the base model's, with weights of their bytes. The base model's own
        ratio is 1 by definition.
        """
        if shape == self.base:
            return 1.0, 0.0
        weights = self._weights
        return math.fsum(weights[size] * self.parts(shape, size).total for size in weights), self.ratio_error

    @functools.cached_property
    def ratio_error(self) -> float:
        """The standard error of a forecast time ratio, over all batch sizes."""
        return math.hypot(*(weight * self.error(size) for size, weight in self._weights.items()))

    @functools.cached_property
    def _weights(self) -> Mapping[int, float]:
        """The share of each batch size in the base model's mean time per token."""
        per_token = {size: ms / size for size, ms in self.base_ms.items()}
        total = math.fsum(per_token.values())
        return {size: each / total for size, each in per_token.items()}

    def parts(self, shape: Shape, batch_size: int) -> Parts:
        """Return where the time of a step goes, for a shape at one of the batch sizes that were timed."""
        return self._fits[batch_size].parts(shape)

    def error(self, batch_size: int) -> float:
        """Return the standard error of a forecast: the root mean square error of checks that were left out of the fit.

        It is no less than that of the probes' own timings, since few checks can be right by chance.
        """
        return self._errors[batch_size]

    @functools.cached_property
    def _fits(self) -> dict[int, _Fit]:
        return {size: _fit(self.base, self.probes, size) for size in self.base_ms}

    @functools.cached_property
    def _errors(self) -> dict[int, float]:
        return {
            size: max(_left_out_error(self.base, self.probes, size), _timing_error(self.probes, size))
            for size in self.base_ms
        }

    def with_probe(self, probe: Probe) -> SpeedTable:
        """Return the table with one more timed model; a probe of the same shape is replaced."""
        kept = tuple(known for known in self.probes if known.shape != probe.shape)
        return dataclasses.replace(self, probes=(*kept, probe))

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        return {
            "version": VERSION,
            "base": dataclasses.asdict(self.base),
            "base_ms": {str(size): value for size, value in self.base_ms.items()},
            "probes": [probe.to_dict() for probe in self.probes],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpeedTable:
        """Return the table that `to_dict` wrote.

        Raises:
            ValueError: It is of another version.
        """
        if values.get("version") != VERSION:
            raise ValueError(f"speed table: version {values.get('version')} is not {VERSION}")
        return cls(
            Shape(**values["base"]),
            {int(size): float(value) for size, value in values["base_ms"].items()},
            tuple(Probe.from_dict(probe) for probe in values["probes"]),
        )


@dataclasses.dataclass(frozen=True)
class _Fit:
    """Coefficients: shares of the baseline's step at the base model's shape."""

    base: Shape
    fixed: float
    head: float
    by_precision: Mapping[str, NDArray[np.float64]]  # layers, attention, mlp
    host: float = 0.0

    def parts(self, shape: Shape) -> Parts:
        own = self.by_precision.get(shape.precision)
        if own is None:
            own = self.by_precision[self.base.precision] * _prior_scale(shape.precision, self.base.precision)
        layers, attention, mlp = (own * _features(shape, self.base)).tolist()
        return Parts(self.fixed, layers, attention, mlp, self.head * shape.head / self.base.head, self.host)


def _features(shape: Shape, base: Shape) -> NDArray[np.float64]:
    """Return what multiplies the coefficients (layers, attention, mlp): 1 each at the base model's shape."""
    depth = shape.num_hidden_layers / base.num_hidden_layers
    return np.array([depth, depth * shape.attention / base.attention, depth * shape.mlp / base.mlp])


def _prior_scale(precision: str, first: str) -> NDArray[np.float64]:
    """Return what a precision's coefficients are expected to be, over those of the first precision."""
    share = WEIGHT_BYTES.get(precision, 2.0) / WEIGHT_BYTES.get(first, 2.0)
    return np.array([1.0, share, share])


def _fit(base: Shape, probes: Sequence[Probe], batch_size: int) -> _Fit:
    """Fit the device's coefficients and the host's time.

    The fastest probes are taken to wait for the host, as many as leave the smallest error: none, or up to half of all.
    """
    ordered = sorted(probes, key=lambda probe: probe.ratio[batch_size])
    best = _device_fit(base, probes, batch_size)
    least = _loss(best, probes, batch_size)
    for waiting in range(2, len(ordered) // 2 + 1):
        host = math.fsum(probe.ratio[batch_size] for probe in ordered[:waiting]) / waiting
        fit = dataclasses.replace(_device_fit(base, ordered[waiting:], batch_size), host=host)
        loss = _loss(fit, probes, batch_size) + EACH_WAITING * waiting
        if loss < least:
            best, least = fit, loss
    return best


def _loss(fit: _Fit, probes: Sequence[Probe], batch_size: int) -> float:
    """Return the sum of squared errors, in standard errors of the timings, the base model's own among them."""
    errors = [
        (fit.parts(probe.shape).total - probe.ratio[batch_size]) / max(probe.ratio_se[batch_size], NOISE)
        for probe in probes
    ]
    errors.append((fit.parts(fit.base).total - 1.0) / NOISE)
    return math.fsum(error * error for error in errors)


def _device_fit(base: Shape, probes: Sequence[Probe], batch_size: int) -> _Fit:
    """Fit the coefficients to the probes and to the base model itself, whose ratio is 1."""
    names = [base.precision, *sorted({probe.shape.precision for probe in probes} - {base.precision})]
    unknowns = 2 + 3 * len(names)
    rows, values = [], []

    def add(row: NDArray[np.float64], value: float, weight: float) -> None:
        rows.append(row * weight)
        values.append(value * weight)

    for shape, ratio, error in [
        (base, 1.0, NOISE),
        *((probe.shape, probe.ratio[batch_size], probe.ratio_se[batch_size]) for probe in probes),
    ]:
        row = np.zeros(unknowns)
        start = 2 + 3 * names.index(shape.precision)
        row[0], row[1] = 1.0, shape.head / base.head
        row[start : start + 3] = _features(shape, base)
        add(row, ratio, NOISE / max(error, NOISE))
    read = np.array([base.head, base.num_hidden_layers * base.attention, base.num_hidden_layers * base.mlp])
    shares = 0.5 * read / read.sum()
    for index, share in zip((1, 3, 4), shares.tolist(), strict=True):  # half of a step is reading weights
        row = np.zeros(unknowns)
        row[index] = 1.0
        add(row, share, PRIOR)
    weight = (1.0, base.mlp / base.attention, 1.0)  # what is small deviates little
    for number, name in enumerate(names[1:], start=1):
        scale = _prior_scale(name, base.precision)
        for part in range(3):
            row = np.zeros(unknowns)
            row[2 + 3 * number + part] = 1.0
            row[2 + part] = -scale[part]
            add(row, 0.0, PRIOR * PRIORS[part] * weight[part])
    solved, _ = nnls(np.stack(rows), np.array(values))
    fixed, head = solved[:2].tolist()
    return _Fit(base, fixed, head, {name: solved[2 + 3 * i : 5 + 3 * i] for i, name in enumerate(names)})


def _timing_error(probes: Sequence[Probe], batch_size: int) -> float:
    """Return the root mean square of the standard errors of the probes' timings."""
    squares = [probe.ratio_se[batch_size] ** 2 for probe in probes]
    return math.sqrt(math.fsum(squares) / len(squares)) if squares else 0.0


def _left_out_error(base: Shape, probes: Sequence[Probe], batch_size: int) -> float:
    """Return the rms error of the fit on checks that it has not seen; of all probes, in the fit, if there is none."""
    errors = []
    for index, probe in enumerate(probes):
        if probe.check:
            rest = [*probes[:index], *probes[index + 1 :]]
            errors.append(_fit(base, rest, batch_size).parts(probe.shape).total - probe.ratio[batch_size])
    if not errors:
        fit = _fit(base, probes, batch_size)
        errors = [fit.parts(probe.shape).total - probe.ratio[batch_size] for probe in probes] or [0.0]
    return max(NOISE, math.sqrt(math.fsum(error * error for error in errors) / len(errors)))
