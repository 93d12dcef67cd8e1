"""What an axis of a plan loses: by its size, and by the choices that go with the cut.

A curve runs through the levels that were scored with the choices that the table begins with. Another choice, such as
`repair: stream` in place of ridge, was scored at one level. Its share of the loss is taken for all levels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from compressors.choices import Value

EVEN = 0.005  # nats per token, added to both losses of a share: smaller ones are noise
ASSUMED = {"stream": 0.8, "distill": 0.5}  # of the loss with ridge, what these repairs leave where none was scored
SCALES = 0.7  # of the loss of rounded weights, what scales that learn are assumed to leave
ASSUMED_ERROR = 0.3  # of a loss, where its share is assumed


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a plan loses.

    Attributes:
        nll: The increase of the loss over the base model's, in nats per token.
        nll_se: Its standard error, from the shards.
        kl: The KL divergence of the base model to the plan, in nats per token; None where it was not computed.
        own_kl: The same on text that the base model wrote and no fit saw.
    """

    nll: float
    nll_se: float
    kl: float | None
    own_kl: float | None = None


@dataclasses.dataclass(frozen=True)
class Scored:
    """A cut along one axis that was scored.

    Attributes:
        size: The size along the axis.
        choices: The values of the plan's choices, by their names.
        loss: What it loses.
    """

    size: float
    choices: Mapping[str, Value]
    loss: Loss


@dataclasses.dataclass(frozen=True)
class AxisLosses:
    """The losses along one axis.

    Attributes:
        curves: The curve of each set of choices that was scored at two levels or more; of the first set in any case.
        shares: Sets of choices that were scored at one level, with the share of the first curve's loss that they leave.
    """

    curves: Sequence[tuple[Mapping[str, Value], Curve]]
    shares: Sequence[tuple[Mapping[str, Value], float]]

    @classmethod
    def of(cls, own_size: float, scored: Sequence[Scored]) -> AxisLosses | None:
        """Gather what was scored along an axis; None where nothing was.

        Args:
            own_size: The base model's size, which loses nothing.
            scored: The cuts, in the order in which they were asked for.
        """
        groups: dict[tuple[tuple[str, Value], ...], dict[float, Loss]] = {}
        for one in scored:
            groups.setdefault(tuple(sorted(one.choices.items())), {})[one.size] = one.loss
        if not groups:
            return None
        first = max(groups, key=lambda choices: len(groups[choices]))  # the first of those with as many levels
        nothing = {own_size: Loss(0.0, 0.0, 0.0)}
        curves = [(dict(first), Curve.through({**groups.pop(first), **nothing}))]
        shares = []
        for choices, losses in groups.items():
            if len(losses) > 1:
                curves.append((dict(choices), Curve.through({**losses, **nothing})))
            theirs = math.fsum(max(loss.nll, 0.0) + EVEN for loss in losses.values())
            reference = math.fsum(max(curves[0][1].at(size), 0.0) + EVEN for size in losses)
            shares.append((dict(choices), theirs / reference))
        return cls(curves, shares)

    def at(self, size: float, choices: Mapping[str, Value]) -> AxisLoss:
        """Return the forecast loss of a cut.

        A choice that was not scored together with the plan's others counts by itself.

        Args:
            size: The size along the axis.
            choices: The plan's choices, by their names.
        """
        for known, curve in self.curves:
            if known == choices:
                return AxisLoss(curve.at(size), curve.error)
        _, first = self.curves[0]
        loss, (share, assumed) = first.at(size), self._share(choices)
        scaled = share * max(loss, 0.0) + min(loss, 0.0)  # noise below zero is no gain that a choice could multiply
        return AxisLoss(scaled, share * first.error, ASSUMED_ERROR * scaled if assumed else 0.0)

    def _share(self, choices: Mapping[str, Value]) -> tuple[float, bool]:
        """Return the share of the first curve's loss that these choices leave, and whether some of it is assumed."""
        known = self._known(choices)
        if known is not None:
            return known, False
        (reference, _), total, assumed = self.curves[0], 1.0, False
        for name, value in choices.items():
            if value == reference[name]:
                continue
            share = self._known({**reference, name: value})
            if share is None:
                assumed, share = True, 1.0
                if name == "repair" and value in ASSUMED:  # of what ridge leaves
                    share = ASSUMED[str(value)] * (self._known({**reference, name: "ridge"}) or 1.0)
            total *= share
        return total, assumed

    def _known(self, choices: Mapping[str, Value]) -> float | None:
        return next((share for known, share in self.shares if known == choices), None)


@dataclasses.dataclass(frozen=True)
class AxisLoss:
    """The forecast loss of a cut along one axis, in nats per token.

    Attributes:
        nll: The loss.
        error: Its standard error, from the shards.
        assumed: The standard error of what was not scored.
    """

    nll: float
    error: float
    assumed: float = 0.0


@dataclasses.dataclass(frozen=True)
class Curve:
    """Losses by size: linear below the lowest level, without overshoot between them (Fritsch, Butland 1984).

    Attributes:
        lowest: The smallest size.
        at_lowest: Its loss in nats per token.
        slope: The change of the loss for each unit of size below it.
        highest: The largest size.
        between: The loss between them, by size.
        error: The standard error of the losses, in nats per token.
    """

    lowest: float
    at_lowest: float
    slope: float
    highest: float
    between: Any
    error: float

    @classmethod
    def through(cls, levels: Mapping[float, Loss]) -> Curve:
        """Return the curve through two levels or more."""
        ordered = dict(sorted(levels.items()))
        x, y = np.array(list(ordered)), np.array([loss.nll for loss in ordered.values()])
        slope = float((y[1] - y[0]) / (x[1] - x[0]))
        error = sorted(loss.nll_se for loss in ordered.values())[len(ordered) // 2]
        between = functools.cache(PchipInterpolator(x, y))  # a size has few values, and many plans
        return cls(float(x[0]), float(y[0]), slope, float(x[-1]), between, error)

    def at(self, size: float) -> float:
        """Return the loss at a size, in nats per token."""
        if size < self.lowest:
            return self.at_lowest + self.slope * (size - self.lowest)
        return float(self.between(min(size, self.highest)))
