"""Defines where a study stands: its trials, its best models, and its distilled finalists."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from compressors.plan import CompressionPlan
from evaluator.measurement import Measurement
from evaluator.score import Score
from search import stages
from search.json_values import known_fields
from search.setup.goal import Goal
from search.show.confirmed_row import ConfirmedRow
from search.show.rows import Result, Row


@dataclasses.dataclass(frozen=True)
class TrialSummary:
    """TrialSummary holds what a study's storage holds of one trial. What a trial did not reach is None.

    Attributes:
        trial: The trial's number.
        state: The name of its Optuna state.
        score: Its Score; None unless it is complete.
        stage: The last stage that it entered.
        reason: Why it was pruned or failed, in one line.
        failure: The kind of error of a failed trial.
        metrics: The metrics of `status`, by name, as far as the storage has them.
        value: What the goal maximizes; None where that is the Score alone, as are the next three.
        constraints: bound − value of each quantity that the goal bounds.
        feasible: Whether a measured trial reaches all bounds.
        result: What a measured trial has of what the goal asks for, in words.
        length_flag: What is wrong with the lengths of its answers; None where nothing is.
    """

    trial: int
    state: str
    score: float | None
    perf_norm: float | None = None
    perf_norm_se: float | None = None
    speed_norm: float | None = None
    speed_norm_se: float | None = None
    score_se: float | None = None
    metrics: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    stage: str | None = None
    reason: str | None = None
    failure: str | None = None
    plan: CompressionPlan | None = None
    value: float | None = None
    constraints: Mapping[str, float] | None = None
    feasible: bool | None = None
    result: str | None = None
    length_flag: str | None = None

    @property
    def is_base(self) -> bool:
        """Whether it is the base model itself, whose Score follows from the definition."""
        return self.stage == stages.BASE

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values without those that are None; the Score is always there.

        The metrics stand next to the other values.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            values |= self.metrics if field.name == "metrics" else {field.name: getattr(self, field.name)}
        values["plan"] = None if self.plan is None else self.plan.to_dict()
        return {name: value for name, value in values.items() if value is not None or name == "score"}

    def row(self) -> Row:
        """Return a measured trial as a row that can be drawn."""
        numbers = (self.perf_norm, self.perf_norm_se, self.speed_norm, self.speed_norm_se, self.score, self.score_se)
        score = Score(*(math.nan if number is None else number for number in numbers))
        return Row(f"trial {self.trial}", "", Result(self.plan, self.metrics, score))


@dataclasses.dataclass(frozen=True)
class FinalistScore:
    """FinalistScore holds the numbers of a finalist before or after its distillation; `_se` are standard errors."""

    score: float
    score_se: float | None = None
    perf_norm: float | None = None
    perf_norm_se: float | None = None
    speed_norm: float | None = None
    speed_norm_se: float | None = None
    kl_nats_per_token: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinalistScore:
        """Return the numbers in `values`. Raises TypeError when the Score is missing."""
        return cls(**known_fields(cls, values))


@dataclasses.dataclass(frozen=True)
class FinalistResult:
    """FinalistResult holds what distillation made of a finalist.

    Attributes:
        after: The numbers of the distilled model.
        tokens: The number of tokens that it was trained on.
        seconds: How long that took.
        held_out_kl: The KL divergence to the base model on held-out text, before and at its best.
        stopped: Why the distillation ended.
        weights_sha256: The digest of the model that was measured; None in a row of an older version.
        length_flag: What is wrong with the lengths of its answers; None where nothing is.
    """

    after: FinalistScore
    tokens: int
    seconds: float
    held_out_kl: tuple[float, float]
    stopped: str
    weights_sha256: str | None = None
    length_flag: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "weights_sha256": self.weights_sha256,
            "after": self.after.to_dict(),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "held_out_kl": list(self.held_out_kl),
            "stopped": self.stopped,
            **({} if self.length_flag is None else {"length_flag": self.length_flag}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinalistResult:
        """Return the result in `values`. Raises KeyError or TypeError when something is missing."""
        before, best = values["held_out_kl"]
        after = FinalistScore.from_dict(values["after"])
        return cls(**{**known_fields(cls, values), "after": after, "held_out_kl": (before, best)})


@dataclasses.dataclass(frozen=True)
class FinalistRow:
    """FinalistRow holds one of a study's best trials, before and after its distillation.

    Attributes:
        trial: The trial's number.
        name: The name of the distilled model's directory.
        path: The path of that directory.
        before: The numbers of the trial.
        result: None where the model could not be made or measured.
        failure: The kind of error, where there is no result.
        reason: The error in one line, where there is no result.
        reused: Whether an earlier call made and measured it; None in the storage, which doesn't hold it.
    """

    trial: int
    name: str
    path: str
    before: FinalistScore
    result: FinalistResult | None = None
    failure: str | None = None
    reason: str | None = None
    reused: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values without the keys that don't apply."""
        begun = {"trial": self.trial, "name": self.name, "path": self.path, "before": self.before.to_dict()}
        if self.result is None:
            return {**begun, "failure": self.failure, "reason": self.reason}
        return {**begun, **self.result.to_dict(), **({} if self.reused is None else {"reused": self.reused})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinalistRow:
        """Return the row in `values`. Raises KeyError or TypeError when something required is missing."""
        result = FinalistResult.from_dict(values) if "after" in values else None
        return cls(
            **{
                **known_fields(cls, values),
                "before": FinalistScore.from_dict(values["before"]),
                "result": result,
            }
        )


@dataclasses.dataclass(frozen=True)
class BestOfAll:
    """BestOfAll names the best model of a study.

    Attributes:
        trial: The number of the trial that it comes from.
        path: The directory of the distilled model; None for the trial's own.
    """

    trial: int
    path: str | None
    score: float | None
    score_se: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Rung:
    """What a rung took and decided.

    Attributes:
        name: The rung.
        trials: The number of trials that reached it.
        ended: The number that it ended: pruned, or measured at the last.
        seconds: The time that all of them spent at it.
        share: That time over the time of all rungs.
        kendall: Kendall's τ between the Scores that this rung and the next one gave to the same trials; None: too few.
        both: The number of these trials.
    """

    name: str
    trials: int
    ended: int
    seconds: float
    share: float
    kendall: float | None
    both: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Contender:
    """Contender holds the Score of a measured model that is not the base model.

    Attributes:
        name: The trial, and the directory of a distilled model.
    """

    name: str
    score: float
    score_se: float | None = None
    speed_norm_se: float | None = None


@dataclasses.dataclass(frozen=True)
class PassedOver:
    """PassedOver names a good trial that is not distilled, and why.

    Attributes:
        trial: The trial's number.
        reason: Why distillation has nothing to win there.
    """

    trial: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class StudyState:
    """StudyState holds where a study stands.

    Attributes:
        study: The study's name.
        trials: The number of finished trials that the last call asked for.
        finished: The number of trials that ended by themselves, whatever their state.
        best: The best measured trial that reaches the goal's bounds.
        pareto: The trials that no other beats in PerfNorm without losing SpeedNorm, by falling PerfNorm.
        pruned_at: The number of pruned trials by stage.
        ended: The trials that were pruned or failed.
        distilled: The finalists, the best Score first.
        best_of_all: The best of the trials and of the distilled models that are still there.
        passed_over: The trials that were not distilled; None where nothing was to be distilled.
        stopped: The number of trials that a person stopped, which are tried again.
        base_score: The Score of the base model by definition; None where the storage doesn't hold the formula.
        contenders: All measured models that are not the base model.
        rungs: The rungs that its trials reached.
        confirmed: The trials that were measured again in fresh engine processes, the best Score first.
        confirmed_best: The best of them; None where the best measured trial is not among them.
        confirmed_miss: The best measured trial as confirmed, where no confirmed trial reaches the goal's bounds.
        goal: What the study searches for.
        closest: Where no measured trial reaches the goal's bounds, the one that misses them by the least.
    """

    study: str
    trials: int | None
    finished: int
    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int
    baseline: Measurement | None
    best: TrialSummary | None
    pareto: tuple[TrialSummary, ...]
    pruned_at: Mapping[str, int]
    ended: tuple[TrialSummary, ...]
    distilled: tuple[FinalistRow, ...]
    best_of_all: BestOfAll | None
    passed_over: tuple[PassedOver, ...] | None = None
    stopped: int = 0
    base_score: float | None = None
    contenders: tuple[Contender, ...] = ()
    rungs: tuple[Rung, ...] = ()
    confirmed: tuple[ConfirmedRow, ...] = ()
    confirmed_best: ConfirmedRow | None = None
    confirmed_miss: ConfirmedRow | None = None
    goal: Goal = dataclasses.field(default_factory=Goal)
    closest: TrialSummary | None = None

    @property
    def stands_out(self) -> str:
        """The name of the model that stands out in a plot: the best trial's; empty where none reaches the goal."""
        return "" if self.best is None else self.best.row().name

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["goal"] = str(self.goal)
        for name in ("baseline", "best", "best_of_all", "closest"):
            values[name] = None if values[name] is None else values[name].to_dict()
        for name in ("pareto", "ended", "distilled", "rungs", "confirmed"):
            values[name] = [one.to_dict() for one in values[name]]
        values["pruned_at"] = dict(self.pruned_at)
        absent = [name for name in ("stopped", "closest") if not values[name]]
        for name in ("base_score", "contenders", "confirmed_best", "confirmed_miss", *absent):
            del values[name]
        if self.passed_over is None:
            del values["passed_over"]
        else:
            values["passed_over"] = [one.to_dict() for one in self.passed_over]
        return values


def finalists_by_score(rows: Iterable[FinalistRow]) -> list[FinalistRow]:
    """Return the finalists with the best Score first and those without a result last."""
    return sorted(rows, key=lambda row: 1.0 if row.result is None else -row.result.after.score)
