"""The damage table of a study: what each size and each precision of the space loses by itself, in memory.

One dimension at a time is cut to a few levels, with the cheap repair, and scored on the first shards of the search
text. A plan's loss is forecast as the sum of what its parts lose: for single losses of medium strength that is what
NVIDIA's and Intel's tools rely on (HIGGS, https://arxiv.org/abs/2411.17525). It fails for strong cuts, so the error
grows with the loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from compressors import build, cached
from compressors.choices import PRECISIONS, SCHEMES
from compressors.errors import CompressionError
from compressors.files import digest_of_json
from compressors.plan import CHOICES, DIMENSIONS, CompressionPlan, canonical, short
from evaluator import score
from evaluator.errors import EvaluationError, NotFinite
from search.config.space_section import Range
from search.say import Say
from search.setup import keys
from search.setup.setting import Setting
from search.stages import screen
from search.stages.screen import Screener

VERSION = 2
LEVELS = (0.0, 0.4, 0.7)  # shares of the way from a dimension's low to its high end
RELATIVE_ERROR = 0.25  # of a sum of losses, as long as no trial has said more
LEAST_RELATIVE_ERROR = 0.05
LEAST_ERROR = 0.003  # nats per token
LEAST_LOSS = 0.03  # nats per token, below which the absolute error counts and no ratio
QUERIES = "queries for each key/value head"  # the axis of num_attention_heads once key/value heads are chosen


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
class Entry:
    """A plan that was scored, which differs from the base model in one dimension or in its precision."""

    plan: CompressionPlan
    loss: Loss


@dataclasses.dataclass(frozen=True)
class DamageTable:
    """What single cuts and precisions lose of one base model."""

    own: CompressionPlan
    entries: tuple[Entry, ...]

    def loss(self, plan: CompressionPlan, relative_error: float = RELATIVE_ERROR) -> tuple[float, float]:
        """Return the forecast increase of the loss in nats per token, and its standard error.

        Args:
            plan: The plan.
            relative_error: The standard error of a sum of losses, over the sum; see `relative_error`.
        """
        total = math.fsum(self.parts(plan).values())
        own, theirs = axes(self.own), axes(plan)
        errors = [curve.error for name, curve in self._curves.items() if theirs[name] != own[name]]
        return max(total, 0.0), math.hypot(relative_error * total, LEAST_ERROR, *errors)

    def parts(self, plan: CompressionPlan) -> dict[str, float]:
        """Return what each axis of the plan is forecast to lose, in nats per token."""
        own, theirs = axes(self.own), axes(plan)
        parts = {name: curve.at(theirs[name]) for name, curve in self._curves.items() if theirs[name] != own[name]}
        if plan.precision != self.own.precision:
            parts["precision"] = self._of_precision(plan)
        return parts

    def levels(self, axis: str) -> dict[float, Loss]:
        """Return the losses along one axis by its value, the base model's 0 among them."""
        own = axes(self.own)
        levels = {own[axis]: Loss(0.0, 0.0, 0.0)}
        for entry in self.entries:
            theirs = axes(entry.plan)
            changed = [name for name in own if theirs[name] != own[name]]
            if changed == [axis] and entry.plan.precision == self.own.precision:
                levels[theirs[axis]] = entry.loss
        return dict(sorted(levels.items()))

    @functools.cached_property
    def _curves(self) -> dict[str, _Curve]:
        curves = {axis: _Curve.through(self.levels(axis)) for axis in axes(self.own)}
        return {axis: curve for axis, curve in curves.items() if curve is not None}

    @functools.cached_property
    def _by_precision(self) -> dict[str, list[Entry]]:
        uncut = [entry for entry in self.entries if axes(entry.plan) == axes(self.own)]
        return {name: [entry for entry in uncut if entry.plan.precision == name] for name in PRECISIONS}

    def _of_precision(self, plan: CompressionPlan) -> float:
        """Return the loss of the entry with the plan's precision that shares most of its other choices."""
        same = self._by_precision.get(plan.precision, [])

        def shared(entry: Entry) -> int:
            return sum(getattr(entry.plan, name) == getattr(plan, name) for name in CHOICES)

        return max(same, key=shared).loss.nll if same else 0.0

    def of_precision(self, plan: CompressionPlan) -> float:
        """Return what the plan's precision is forecast to lose by itself, in nats per token."""
        return 0.0 if plan.precision == self.own.precision else self._of_precision(plan)

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        entries = [{"plan": entry.plan.to_dict(), **dataclasses.asdict(entry.loss)} for entry in self.entries]
        return {"version": VERSION, "own": self.own.to_dict(), "entries": entries}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DamageTable:
        """Return the table that `to_dict` wrote.

        Raises:
            ValueError: It is of another version.
        """
        if values.get("version") != VERSION:
            raise ValueError(f"damage table: version {values.get('version')} is not {VERSION}")
        entries = [
            Entry(
                CompressionPlan.from_dict(entry["plan"]),
                Loss(entry["nll"], entry["nll_se"], entry["kl"], entry.get("own_kl")),
            )
            for entry in values["entries"]
        ]
        return cls(CompressionPlan.from_dict(values["own"]), tuple(entries))


def relative_error(seen: Sequence[tuple[float, float]]) -> float:
    """Return the relative error of forecast losses that trials show; RELATIVE_ERROR counts as one trial.

    Args:
        seen: The forecast and the screened loss of each trial, in nats per token.
    """
    errors = [(screened - forecast) / max(forecast, LEAST_LOSS) for forecast, screened in seen]
    total = RELATIVE_ERROR**2 + math.fsum(error * error for error in errors)
    return max(math.sqrt(total / (1 + len(errors))), LEAST_RELATIVE_ERROR)


def axes(plan: CompressionPlan) -> dict[str, float]:
    """Return the sizes of a plan whose losses are added; query heads count for each key/value head."""
    values = {name: float(getattr(plan, name)) for name in DIMENSIONS if name != "num_attention_heads"}
    return {**values, QUERIES: plan.num_attention_heads / plan.num_key_value_heads}


@dataclasses.dataclass(frozen=True)
class _Curve:
    """Losses along one axis: linear below the lowest level, without overshoot between them (Fritsch, Butland 1984)."""

    lowest: float
    at_lowest: float
    slope: float
    highest: float
    between: Any
    error: float

    @classmethod
    def through(cls, levels: Mapping[float, Loss]) -> _Curve | None:
        if len(levels) < 2:
            return None
        x, y = np.array(list(levels)), np.array([loss.nll for loss in levels.values()])
        slope = float((y[1] - y[0]) / (x[1] - x[0]))
        error = sorted(loss.nll_se for loss in levels.values())[len(levels) // 2]
        between = functools.cache(PchipInterpolator(x, y))  # a size has few values, and many plans
        return cls(float(x[0]), float(y[0]), slope, float(x[-1]), between, error)

    def at(self, value: float) -> float:
        if value < self.lowest:
            return self.at_lowest + self.slope * (value - self.lowest)
        return float(self.between(min(value, self.highest)))


def path_of(setting: Setting) -> Path:
    """Return the file that keeps the table."""
    shards = [list(map(list, shard)) for shard in setting.texts.shards[: screen.FEW]]
    key = [VERSION, setting.model.digest, keys.calibration_key(setting), digest_of_json(shards, 16)]
    return setting.outputs / "forecast" / f"damage-{digest_of_json(key, 16)}.json"


def known(setting: Setting) -> DamageTable | None:
    """Return the table if it holds anything."""
    table = cached.known(path_of(setting), lambda path: DamageTable.from_dict(cached.read_json(path)))
    return table if table is not None and table.entries else None


def wanted(setting: Setting) -> list[CompressionPlan]:
    """Return the plans to score: each searched size at LEVELS, each searched precision by each of its methods."""
    own, space = setting.model.identity, setting.file.space
    repair = "ridge" if any(name != "none" for name in space.repair) else "none"
    chosen = {name: getattr(space, name)[0] for name in CHOICES if isinstance(getattr(space, name), list)}
    start = dataclasses.replace(own, **{**chosen, "repair": repair})
    plans = [plan for name in DIMENSIONS for plan in _cut(start, name, space, own)]
    for precision in space.precision or []:
        for quantizer, smoothing in itertools.product(space.quantizer, space.smoothing):
            if precision not in SCHEMES and (quantizer, smoothing) != (space.quantizer[0], space.smoothing[0]):
                continue
            plans.append(dataclasses.replace(start, precision=precision, quantizer=quantizer, smoothing=smoothing))
    distinct = dict.fromkeys(canonical(plan, own) for plan in plans)
    return [plan for plan in distinct if axes(plan) != axes(own) or plan.precision != own.precision]


def _cut(start: CompressionPlan, name: str, space: Any, own: CompressionPlan) -> Iterator[CompressionPlan]:
    wanted, full = getattr(space, name), getattr(own, name)
    if wanted is None:
        return
    values = [wanted] if not isinstance(wanted, Range) else []
    for level in LEVELS if isinstance(wanted, Range) else ():
        values.append(wanted.low + round((wanted.high - wanted.low) // wanted.step * level) * wanted.step)
    each = own.num_attention_heads // own.num_key_value_heads
    for value in dict.fromkeys(values):
        if value == full:
            continue
        if name == "num_key_value_heads":
            yield dataclasses.replace(start, num_key_value_heads=value, num_attention_heads=value * each)
        elif name == "num_attention_heads":
            shared = max(value // own.num_key_value_heads, 1) * own.num_key_value_heads
            yield dataclasses.replace(start, num_attention_heads=shared)
        else:
            yield dataclasses.replace(start, **{name: value})


def damage_table(setting: Setting, screener: Screener, say: Say) -> DamageTable:
    """Return the table; score what it lacks. Plans that can't be built are left out.

    Args:
        setting: What the study shares.
        screener: The worker's.
        say: Told what is done.

    Raises:
        NotFinite: The base model is broken.
    """
    table = known(setting) or DamageTable(setting.model.identity, ())
    scored = {entry.plan for entry in table.entries}
    missing = [plan for plan in wanted(setting) if plan not in scored and _buildable(setting, plan)]
    base = screener.base_nll(say)
    fits = any(build.needs_moments(plan) for plan in missing)  # then the base model writes anyway, if it is asked to
    if fits and setting.machine.device == "cuda":  # on a CPU the two would only disturb each other
        while_writing(setting, screener, missing, say)
    for number, plan in enumerate(missing, start=1):
        say(f"damage table: plan {number} of {len(missing)}")
        try:
            loss = _scored(screener, plan, base, say, on_own=fits)
        except (CompressionError, EvaluationError) as error:
            say(f"damage table: left out: {error}")
            continue
        table = dataclasses.replace(table, entries=(*table.entries, Entry(plan, loss)))
        cached.keep_json(path_of(setting), table.to_dict())
    return table


def while_writing(setting: Setting, screener: Screener, plans: Sequence[CompressionPlan], say: Say) -> None:
    """Score the plans that rest on no second moments, while the base model writes its part of the text for the others.

    On a GPU the engine that it writes with takes up to a minute to start. What fails is told by what asks for it next.
    """

    def write() -> None:
        with contextlib.suppress(Exception, KeyboardInterrupt):
            setting.texts.unseen()

    threading.Thread(target=write, daemon=True).start()
    for plan in plans:
        if not build.needs_moments(plan):
            with contextlib.suppress(CompressionError, EvaluationError):
                screener.cheap(plan, say)


def _buildable(setting: Setting, plan: CompressionPlan) -> bool:
    return build.check(plan, setting.model.checkpoint, setting.model.family) is None


def _scored(screener: Screener, plan: CompressionPlan, base: Sequence[float], say: Say, *, on_own: bool) -> Loss:
    own_kl = screen.mean_known(screener.unseen(plan, say).kl) if on_own else None
    scored = screener.cheap(plan, say)
    gains = scored.lost(base)
    if not all(map(math.isfinite, gains)):
        raise NotFinite(f"the loss of {short(plan)} is NaN or infinite")
    return Loss(
        nll=math.fsum(gains) / len(gains),
        nll_se=score.standard_error(gains),
        kl=screen.mean_known(scored.kl),
        own_kl=own_kl,
    )
