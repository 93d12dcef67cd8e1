"""Defines the record of a trial, which its stages fill while it runs."""

from __future__ import annotations

import dataclasses
from typing import Any

from compressors.plan import CompressionPlan
from evaluator import score
from evaluator.measurement import METRICS, Measurement
from search import stages
from search.failures import Fault
from search.setup.goal import Goal, Known
from search.show import goal_text
from search.stages.screen import Screen
from search.study import trials


@dataclasses.dataclass
class Record:
    """Record holds the state and the results of a running trial, for progress, the dashboard and MLflow.

    Attributes:
        number: The number of the trial in the study.
        plan: The suggested plan.
        stage: The stage that the trial has reached.
        reason: Why the trial was pruned or has failed, in one line.
        failure: The kind of failure; "" for none.
        cheap_loss: What the cut alone loses in the cheap screen, in nats per token.
        loss: What the plan loses in the full screen, in nats per token, on the shards that were scored.
        forecast: The Score that was forecast.
        shard_values: The value of each shard of the screen, see `search.study.objective`.
        screen: The result of the screen.
        predicted_speed_norm: The SpeedNorm that is predicted from weight bytes.
        measurement: The result of the measurement.
        score: The Score of the measurement.
        length_flag: What is wrong with the lengths of its answers, in one line; None where nothing is.
        goal: The goal of the study.
        known: What was measured, as the goal asks for it.
        fault: Whether the plan or the machine failed; None without a failure.
        again: Whether the plan is queued again, since the machine failed and not the plan.
        reused: Whether the results were copied from an earlier trial with the same plan.
        seconds: The seconds that each stage took.
    """

    number: int
    plan: CompressionPlan | None = None
    stage: str = "plan"
    reason: str = ""
    failure: str = ""
    cheap_loss: float | None = None
    loss: float | None = None
    forecast: score.Score | None = None
    shard_values: list[float] = dataclasses.field(default_factory=list)
    screen: Screen | None = None
    predicted_speed_norm: float | None = None
    measurement: Measurement | None = None
    score: score.Score | None = None
    length_flag: str | None = None
    goal: Goal = dataclasses.field(default_factory=Goal)
    known: Known | None = None
    fault: Fault | None = None
    again: bool = False
    reused: bool = False
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def stopped(self) -> bool:
        """Whether a person stopped the trial, which is tried again."""
        return self.failure == trials.INTERRUPTED

    @property
    def by_definition(self) -> str:
        """What the trial's Score follows from, if it is the base model itself; else empty."""
        if self.stage != stages.BASE or self.score is None:
            return ""
        if not self.goal.is_score:
            return "the base model itself"
        return f"the base model itself: {self.score.score:g} by definition"

    @property
    def result(self) -> str:
        """What a measured trial has of what the goal asks for; empty of any other."""
        return "" if self.known is None else goal_text.of_known(self.goal, self.known)

    def attributes(self) -> dict[str, Any]:
        """Return the trial's user attributes: numbers for the dashboard, and what resuming and export need."""
        values: dict[str, Any] = {"seconds": {stage: round(s, 3) for stage, s in self.seconds.items()}}
        if self.reason:
            values["reason"] = self.reason
        if self.failure:
            values["failure"] = self.failure
        if self.again:
            values[trials.AGAIN] = None if self.fault is None else self.fault.value
        if self.reused:
            values["reused"] = True
        values |= {"cheap_loss": self.cheap_loss, "loss": self.loss}
        if self.forecast is not None:
            values |= {
                "forecast_score": self.forecast.score,
                "forecast_score_se": self.forecast.score_se,
                "forecast_perf_norm": self.forecast.perf_norm,
                "forecast_speed_norm": self.forecast.speed_norm,
            }
        if self.predicted_speed_norm is not None:
            values["predicted_speed_norm"] = self.predicted_speed_norm
        if self.measurement is not None and self.score is not None:
            measured = self.measurement
            values |= {
                "perf_norm": self.score.perf_norm,
                "perf_norm_se": self.score.perf_norm_se,
                "speed_norm": self.score.speed_norm,
                "speed_norm_se": self.score.speed_norm_se,
                "score_se": self.score.score_se,
                **{name: getattr(measured, name) for name, metric in METRICS.items() if metric.attribute},
            }
            values["length_flag"] = self.length_flag
            if not self.goal.is_score:
                values["score"] = self.score.score  # else it is the trial's value
        return {name: value for name, value in values.items() if value is not None}
