"""The damage table of a study: what each size and each precision of the space loses by itself, in memory.

One dimension at a time is cut to a few levels, with the cheap repair, and scored on the first shards of the search
text. Every other choice that goes with the cut is scored at one of the levels, but for the slow ones. A plan's loss is
forecast as the sum of what its parts lose: for single losses of medium strength that is what NVIDIA's and Intel's tools
rely on (HIGGS, https://arxiv.org/abs/2411.17525). It fails for strong cuts, so the error grows with the loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors import build, cached
from compressors.choices import PRECISIONS, Value
from compressors.errors import CompressionError
from compressors.files import alone, digest_of_json
from compressors.plan import CHOICES, CompressionPlan, canonical, learns_scales, short
from evaluator import score
from evaluator.errors import EvaluationError, NotFinite
from search import secrets
from search.failures import OUT_OF_MEMORY
from search.say import Say
from search.setup import keys
from search.setup.setting import Setting
from search.stages import damage_plans, screen
from search.stages.damage_axes import along, axes
from search.stages.damage_curves import ASSUMED_ERROR, SCALES, AxisLoss, AxisLosses, Loss, Scored
from search.stages.screen import Screener

VERSION = 2
RELATIVE_ERROR = 0.25  # of a sum of losses, as long as no trial has said more
LEAST_RELATIVE_ERROR = 0.05
LEAST_ERROR = 0.003  # nats per token
LEAST_LOSS = 0.03  # nats per token, below which the absolute error counts and no ratio
NOT_SCORED = 0.1  # nats per token that are assumed, and their error, for a part of a plan that could not be scored
UNKNOWN = AxisLoss(NOT_SCORED, 0.0, NOT_SCORED)
BROKEN = 10.0  # nats per token of a plan whose loss is NaN: about what a model loses that knows nothing
OF_CUTS = tuple(name for name, record in CHOICES.items() if not record.schemes)  # those that no scheme brings


@dataclasses.dataclass(frozen=True)
class Entry:
    """A plan that was scored, which differs from the base model along one axis or in its precision."""

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
        parts = [*self._cuts(plan).values(), self._of_precision(plan)]
        total = math.fsum(part.nll for part in parts)
        shown = relative_error / RELATIVE_ERROR  # what trials have shown, they have shown of what was assumed too
        errors = [math.hypot(part.error, shown * part.assumed) for part in parts]
        return max(total, 0.0), math.hypot(relative_error * total, LEAST_ERROR, *errors)

    def parts(self, plan: CompressionPlan) -> dict[str, float]:
        """Return what each axis of the plan is forecast to lose, in nats per token."""
        parts = {name: cut.nll for name, cut in self._cuts(plan).items()}
        return parts if plan.precision == self.own.precision else {**parts, "precision": self.of_precision(plan)}

    def share(self, plan: CompressionPlan, other: CompressionPlan) -> float | None:
        """Return the forecast loss of a plan's cuts over that of another's, precisions apart.

        Args:
            plan: The plan.
            other: One of the same sizes, with other choices.

        Returns:
            The share; None where the other's loss is too small for one.
        """
        loss, reference = (math.fsum(cut.nll for cut in self._cuts(each).values()) for each in (plan, other))
        return max(loss, 0.0) / reference if reference > LEAST_LOSS else None

    def _cuts(self, plan: CompressionPlan) -> dict[str, AxisLoss]:
        """Return the loss along each axis on which the plan differs from the base model."""
        own, theirs = axes(self.own), axes(plan)
        chosen = tuple(getattr(plan, name) for name in OF_CUTS)
        changed = [name for name in own if theirs[name] != own[name]]
        return {
            name: self._axes[name].at(theirs[name], self._alone(name, theirs[name], chosen))
            if name in self._axes
            else UNKNOWN
            for name in changed
        }

    @functools.cached_property
    def _alone(self) -> Callable[[str, float, tuple[Value, ...]], Mapping[str, Value]]:
        """Return what gives the choices that make a difference to a cut along one axis; many plans share them."""
        own = self.own

        def alone(axis: str, size: float, chosen: tuple[Value, ...]) -> Mapping[str, Value]:
            changes: dict[str, Any] = {**dict(zip(OF_CUTS, chosen, strict=True)), **along(own, axis, size)}
            plan = canonical(dataclasses.replace(own, **changes), own)
            return {name: getattr(plan, name) for name in OF_CUTS}

        return functools.cache(alone)

    @functools.cached_property
    def _axes(self) -> dict[str, AxisLosses]:
        own = axes(self.own)
        scored: dict[str, list[Scored]] = {axis: [] for axis in own}
        for entry in self.entries:
            theirs = axes(entry.plan)
            changed = [name for name in own if theirs[name] != own[name]]
            if len(changed) == 1 and entry.plan.precision == self.own.precision:
                (axis,), chosen = changed, tuple(getattr(entry.plan, name) for name in OF_CUTS)
                scored[axis].append(Scored(theirs[axis], self._alone(axis, theirs[axis], chosen), entry.loss))
        losses = {axis: AxisLosses.of(own[axis], some) for axis, some in scored.items()}
        return {axis: of_axis for axis, of_axis in losses.items() if of_axis is not None}

    @functools.cached_property
    def _by_precision(self) -> dict[str, list[Entry]]:
        uncut = [entry for entry in self.entries if axes(entry.plan) == axes(self.own)]
        return {name: [entry for entry in uncut if entry.plan.precision == name] for name in PRECISIONS}

    def of_precision(self, plan: CompressionPlan) -> float:
        """Return what the plan's precision is forecast to lose by itself, in nats per token.

        That is the loss of the entry with this precision that shares most of the plan's other choices.
        """
        return self._of_precision(plan).nll

    def _of_precision(self, plan: CompressionPlan) -> AxisLoss:
        if plan.precision == self.own.precision:
            return AxisLoss(0.0, 0.0)
        same = self._by_precision.get(plan.precision, [])

        def shared(entry: Entry) -> int:
            return sum(getattr(entry.plan, name) == getattr(plan, name) for name in CHOICES)

        if not same:
            return UNKNOWN
        found = max(same, key=shared).loss
        if learns_scales(plan):  # which takes too long for a table
            return AxisLoss(SCALES * found.nll, found.nll_se, ASSUMED_ERROR * SCALES * max(found.nll, 0.0))
        return AxisLoss(found.nll, found.nll_se)

    def lacks(self, plans: Sequence[CompressionPlan]) -> list[CompressionPlan]:
        """Return the plans that were not scored."""
        scored = {entry.plan for entry in self.entries}
        return [plan for plan in plans if plan not in scored]

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


def path_of(setting: Setting) -> Path:
    """Return the file that keeps the table."""
    shards = [list(map(list, shard)) for shard in setting.texts.shards[: screen.FEW]]
    fitted = [keys.fitted_to(setting), build.all_versions()]
    key = [VERSION, setting.model.digest, keys.calibration_key(setting), digest_of_json(shards, 16), *fitted]
    return setting.outputs / "forecast" / f"damage-{digest_of_json(key, 16)}.json"


def known(setting: Setting, *, held: bool = False) -> DamageTable | None:
    """Return the table if it holds anything.

    Args:
        setting: What the study shares.
        held: Whether the caller holds `alone(path_of(setting))`.
    """
    table = cached.known(path_of(setting), lambda path: DamageTable.from_dict(cached.read_json(path)), held=held)
    return table if table is not None and table.entries else None


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
    base = screener.base_nll(say)
    missing = table.lacks(damage_plans.wanted(setting))
    # then the base model writes anyway, if it is asked to; on a CPU that and scoring would only disturb each other
    if any(map(build.needs_moments, missing)) and setting.machine.device == "cuda":
        while_writing(setting, screener, missing, say)
    table = _with(table, missing, setting, screener, base, say)
    lost = {entry.plan: entry.loss.nll for entry in table.entries}
    return _with(table, table.lacks(damage_plans.where_ridge_breaks(setting, lost)), setting, screener, base, say)


def _with(
    table: DamageTable,
    plans: Sequence[CompressionPlan],
    setting: Setting,
    screener: Screener,
    base: Sequence[float],
    say: Say,
) -> DamageTable:
    """Return the table with the plans scored, kept after each of them."""
    fits = any(map(build.needs_moments, plans))
    for number, plan in enumerate(plans, start=1):
        if not table.lacks([plan]):  # another run has scored it meanwhile
            continue
        say(f"damage table: plan {number} of {len(plans)}")
        try:
            loss = _scored(screener, plan, base, say, on_own=fits)
        except NotFinite as error:
            say(f"damage table: {short(plan)}: {secrets.line_of(error)}")
            loss = Loss(BROKEN, 0.0, None)
        except (CompressionError, EvaluationError, *OUT_OF_MEMORY) as error:
            say(f"damage table: left out: {secrets.line_of(error)}")
            continue
        table = _keep(setting, dataclasses.replace(table, entries=(*table.entries, Entry(plan, loss))))
    return table


def _keep(setting: Setting, made: DamageTable) -> DamageTable:
    """Keep a table together with what another run has added meanwhile, and return both."""
    path = path_of(setting)
    with alone(path):
        before = known(setting, held=True)
        added = [] if before is None else [entry for entry in before.entries if made.lacks([entry.plan])]
        table = dataclasses.replace(made, entries=(*made.entries, *added))
        cached.keep_json(path, table.to_dict())
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
            with contextlib.suppress(CompressionError, EvaluationError, *OUT_OF_MEMORY):
                screener.cheap(plan, say)


def _scored(screener: Screener, plan: CompressionPlan, base: Sequence[float], say: Say, *, on_own: bool) -> Loss:
    own_kl = screen.mean_known(screener.unseen(plan, say).kl) if on_own else None
    scored = screener.cheap(plan, say)
    gains = scored.lost(base)
    return Loss(
        nll=math.fsum(gains) / len(gains),
        nll_se=score.standard_error(gains),
        kl=screen.mean_known(scored.kl),
        own_kl=own_kl,
    )
