"""ForecastView holds what `forecast` shows: what pays on this machine, what each part costs, and the best plans."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compressors.plan import CompressionPlan, short
from evaluator.score import Score
from search.setup.goal import Goal, Known
from search.show import goal_text

FEW = 3  # best plans
OWN_KL = "KL, own text"
STANDS_FOR_SERVER = (
    "no server was started for these times: an engine that is given as many requests at once stands for `vllm serve`, "
    "which schedules and streams besides"
)
PREDICTED = "nothing was timed: SpeedNorm is predicted from the weights that a token reads and the number of layers"


@dataclasses.dataclass(frozen=True)
class Pays:
    """The time of one precision at the base model's sizes.

    Attributes:
        precision: The dtype or the scheme.
        time_ratio: The time per token over the base model's.
        time_ratio_se: Its standard error.
        layer: What one layer adds, as a share of the base model's time per token.
        parts: Where a step's time goes, as shares of the base model's step of that batch size; by batch size.
    """

    precision: str
    time_ratio: float
    time_ratio_se: float
    layer: float
    parts: Mapping[int, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Costs:
    """The loss of one cut, or of one precision, by itself.

    Attributes:
        change: The change in words: `num_hidden_layers 26 of 28`.
        nll: The increase of the loss in nats per token.
        nll_se: Its standard error.
        kl: The KL divergence of the base model to it, in nats per token.
        own_kl: The same on text that the base model wrote and no fit saw; None where it wrote none.
        perf_norm: PerfNorm on these shards.
        speed_norm: The forecast SpeedNorm.
    """

    change: str
    nll: float
    nll_se: float
    kl: float | None
    own_kl: float | None
    perf_norm: float
    speed_norm: float


@dataclasses.dataclass(frozen=True)
class Step:
    """Where the time of a decode step of the base model goes.

    Attributes:
        batch_size: The number of sequences decoded together.
        wall_ms: The milliseconds that the step takes.
        busy_ms: Those in which the GPU runs a kernel or a copy; None where that could not be profiled.
        floor_ms: Those in which its memory can move the weights once; None where not measured.
    """

    batch_size: int
    wall_ms: float
    busy_ms: float | None = None
    floor_ms: float | None = None

    @property
    def host_ms(self) -> float | None:
        """The milliseconds in which the GPU waits for the host."""
        return None if self.busy_ms is None else max(self.wall_ms - self.busy_ms, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the step as JSON values."""
        share = None if self.busy_ms is None else self.busy_ms / self.wall_ms
        return {**dataclasses.asdict(self), "busy_share": share, "host_ms": self.host_ms}


@dataclasses.dataclass(frozen=True)
class Best(Score):
    """A plan of the space and what it is forecast to score; `size` is over the base model's."""

    plan: CompressionPlan
    size: float = math.nan

    @property
    def known(self) -> Known:
        """What is known of the plan, as goals ask for it."""
        return Known(self, self.size)


@dataclasses.dataclass(frozen=True)
class ForecastView:
    """A forecast for people.

    Attributes:
        study: The study's name.
        device: The device's name.
        engine: The engine's name.
        base_ms: The base model's milliseconds for a decode step, by batch size; where whole requests are timed, for as
            many tokens as run at once.
        floor_ms: The milliseconds in which the device reads the base model's weights once; None where not measured.
        own_score: The base model's Score.
        pays: Each precision's time.
        costs: Each single loss.
        lossless: The Score of the fastest plan of the space if nothing were lost.
        best: The plans that serve the goal best, the best first.
        front: The plans that no other is forecast to beat in PerfNorm without losing SpeedNorm, by falling PerfNorm.
        goal: What the study searches for.
        fastest: The largest forecast SpeedNorm of a plan of the space.
        smallest: The smallest size of one, over the base model's, where the goal is size.
        steps: Where the base model's time goes, for each batch size.
        whole_requests: Whether whole requests are timed, of the workload's kind batch or serve.
        stands_for_server: Whether engines that were given requests at once stand for servers.
    """

    study: str
    device: str
    engine: str
    base_ms: Mapping[int, float]
    floor_ms: float | None
    own_score: float
    pays: tuple[Pays, ...]
    costs: tuple[Costs, ...]
    lossless: float
    best: tuple[Best, ...]
    front: tuple[Best, ...] = ()
    goal: Goal = dataclasses.field(default_factory=Goal)
    fastest: float = math.nan
    smallest: float = math.nan
    steps: tuple[Step, ...] = ()
    whole_requests: bool = False
    stands_for_server: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the view as JSON values; what only another goal than the Score asks for is left out without one."""
        values = dataclasses.asdict(self)
        unsaid = [name for name in ("whole_requests", "stands_for_server") if not values[name]]
        for name in ("goal", "fastest", "smallest", *unsaid):
            del values[name]
        if self.goal.is_default:
            for row in (*values["best"], *values["front"]):
                del row["size"]
        else:
            values["goal"] = str(self.goal)
            for row, plan in zip(values["best"], self.best, strict=True):
                row["feasible"] = self.goal.reaches(plan.known)
        values["base_ms"] = {str(size): ms for size, ms in self.base_ms.items()}
        values["steps"] = [step.to_dict() for step in self.steps]
        for row in values["pays"]:
            row["parts"] = {str(size): parts for size, parts in row["parts"].items()}
        return values


def forecast_table(view: ForecastView) -> RenderableType:
    """Return the forecast as tables: what pays, what it costs, and the best plans."""
    steps = ", ".join(f"{ms:.3f} ms at batch {size}" for size, ms in view.base_ms.items())
    lines = [Text(f"forecast of study {view.study} on {view.device} with {view.engine}")]
    if view.whole_requests and view.base_ms:
        tokens = ", ".join(f"{ms / size:.4f} ms with {size} at once" for size, ms in view.base_ms.items())
        lines.append(Text(f"a token of the base model in whole requests: {tokens}"))
    if view.stands_for_server:
        lines.append(Text(STANDS_FOR_SERVER))
    if not view.base_ms:
        lines.append(Text(PREDICTED))
    elif not view.whole_requests:
        floor = f"; reading its weights once takes {view.floor_ms:.3f} ms" if view.floor_ms else ""
        lines.append(Text(f"one decode step of the base model: {steps}{floor}"))
    return Group(*lines, *_tables(view), *map(Text, conclusions(view)))


def brief(view: ForecastView) -> RenderableType:
    """Return what `run` shows of a forecast before its first trial: the tables with the FEW best plans."""
    few = dataclasses.replace(view, best=view.best[:FEW], steps=())
    lines = [Text(STANDS_FOR_SERVER)] if view.stands_for_server else []
    return Group(*lines, *_tables(few), *map(Text, conclusions(view)))


def conclusions(view: ForecastView) -> list[str]:
    """Return what follows from the forecast, in sentences."""
    if not view.goal.is_default:
        return _of_goal(view)
    lines = [f"If nothing were lost, the fastest plan of the space would score {view.lossless:.3f}."]
    if not view.best:
        return lines
    best = view.best[0]
    gain = best.score - view.own_score
    if gain > 2 * best.score_se:
        lines.append(f"The best plan is forecast to score {best.score:.3f} ± {best.score_se:.3f}.")
    else:
        lines.append(
            f"No plan of this space is forecast to beat the base model's {view.own_score:.3f} beyond the error: the "
            f"best has {best.score:.3f} ± {best.score_se:.3f}."
        )
    return lines


def _of_goal(view: ForecastView) -> list[str]:
    goal, lines = view.goal, [f"The goal is to {view.goal}."]
    if goal.is_score:
        lines.append(f"If nothing were lost, the fastest plan of the space would score {view.lossless:.3f}.")
    if goal.objective == "size":
        lines.append(f"The smallest plan of the space has {view.smallest:.3f} of the base model's size.")
    if goal.objective in ("time_per_token", "speed_norm") or goal.bound("speed_norm") is not None:
        time = f"The fastest plan of the space takes {1.0 - view.fastest:.3f} of the base model's time per token"
        lines.append(f"{time}, SpeedNorm {view.fastest:.3f}.")
    if not view.best:
        return lines
    best = view.best[0]
    told = goal_text.of_known(goal, best.known)
    if goal.reaches(best.known):
        return [*lines, f"The best plan is forecast to have {told}."]
    return [*lines, f"No plan that was looked at is forecast to reach the goal; the closest has {told}."]


def _shares(parts: Mapping[str, float]) -> str:
    """Return a step's parts in percent; the host's time, beside which they run, is given where a probe shows it."""
    device = " ".join(f"{100 * share:3.0f}%" for name, share in parts.items() if name != "host")
    return f"{device}; " + (f"{100 * parts['host']:3.0f}%" if parts["host"] else "   –")


def _steps(steps: Sequence[Step]) -> Table:
    table = Table(title="a decode step of the base model, in ms", title_justify="left", box=None, pad_edge=False)
    for name in ("batch", "wall", "GPU busy", "host", "weights read once"):
        table.add_column(name, justify="right")
    for step in steps:
        busy = "–" if step.busy_ms is None else f"{step.busy_ms:.3f} ({100 * step.busy_ms / step.wall_ms:.0f}%)"
        host, floor = ("–" if ms is None else f"{ms:.3f}" for ms in (step.host_ms, step.floor_ms))
        table.add_row(str(step.batch_size), f"{step.wall_ms:.3f}", busy, host, floor)
    return table


def _tables(view: ForecastView) -> list[RenderableType]:
    tables: list[RenderableType] = []
    if any(step.busy_ms is not None or step.floor_ms is not None for step in view.steps):
        tables.append(_steps(view.steps))
    if view.pays:
        pays = Table(title="what pays, at the base model's sizes", title_justify="left", box=None, pad_edge=False)
        for name in ("precision", "SpeedNorm", "a layer"):
            pays.add_column(name, justify="left" if name == "precision" else "right")
        for size in view.base_ms:
            pays.add_column(f"batch {size}: fixed, layers, attention, MLP, lm_head; host", justify="right")
        for row in view.pays:
            shares = [_shares(parts) for parts in row.parts.values()]
            norm = f"{1 - row.time_ratio:+.3f} ± {row.time_ratio_se:.3f}"
            pays.add_row(row.precision, norm, f"{100 * row.layer:.2f}%", *shares)
        tables.append(pays)
    if view.costs:
        costs = Table(title="what it costs, each by itself", title_justify="left", box=None, pad_edge=False)
        of_own = [OWN_KL] if any(cost.own_kl is not None for cost in view.costs) else []
        for name in ("change", "PerfNorm", "loss, nats per token", "KL", *of_own, "SpeedNorm"):
            costs.add_column(name, justify="left" if name == "change" else "right")
        for cost in view.costs:
            known = [cost.kl, *([cost.own_kl] if of_own else [])]
            costs.add_row(
                cost.change,
                f"{cost.perf_norm:.3f}",
                f"{cost.nll:+.4f} ± {cost.nll_se:.4f}",
                *("–" if kl is None else f"{kl:.4f}" for kl in known),
                f"{cost.speed_norm:+.3f}",
            )
        tables.append(costs)
    if view.best:
        best = Table(title="the best plans of the space", title_justify="left", box=None, pad_edge=False)
        own = () if view.goal.is_default else ("size", "reaches the goal")
        for name in ("plan", "PerfNorm", "SpeedNorm", "Score", *own):
            best.add_column(name, justify="left" if name == "plan" else "right")
        for each in view.best:
            best.add_row(
                short(each.plan),
                f"{each.perf_norm:.3f} ± {each.perf_norm_se:.3f}",
                f"{each.speed_norm:+.3f} ± {each.speed_norm_se:.3f}",
                f"{each.score:.3f} ± {each.score_se:.3f}",
                *((f"{each.size:.3f}", "yes" if view.goal.reaches(each.known) else "no") if own else ()),
            )
        tables.append(best)
    return tables
