"""What a trial says of itself while it runs."""

from __future__ import annotations

import dataclasses
from typing import Any

from compressors.plan import CompressionPlan
from evaluator import score
from evaluator.measurement import METRICS, Measurement
from search.stages.screen import Screen


@dataclasses.dataclass
class Record:
    """What a trial says of itself while it runs: for the progress line, the dashboard and MLflow."""

    number: int
    plan: CompressionPlan | None = None
    stage: str = "plan"
    reason: str = ""
    failure: str = ""
    screen: Screen | None = None
    predicted_speed_norm: float | None = None
    measurement: Measurement | None = None
    score: score.Score | None = None
    reused: bool = False
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def attributes(self) -> dict[str, Any]:
        """Flat numbers that the dashboard can sort by, and what resuming and exporting need."""
        found: dict[str, Any] = {"seconds": {stage: round(s, 3) for stage, s in self.seconds.items()}}
        if self.reason:
            found["reason"] = self.reason
        if self.failure:
            found["failure"] = self.failure
        if self.reused:
            found["reused"] = True
        if self.predicted_speed_norm is not None:
            found["predicted_speed_norm"] = self.predicted_speed_norm
        if self.measurement is not None and self.score is not None:
            measured = self.measurement
            found |= {
                "perf_norm": self.score.perf_norm,
                "perf_norm_se": self.score.perf_norm_se,
                "speed_norm": self.score.speed_norm,
                "speed_norm_se": self.score.speed_norm_se,
                "score_se": self.score.score_se,
                **{name: getattr(measured, name) for name, metric in METRICS.items() if metric.attribute},
            }
        return {name: value for name, value in found.items() if value is not None}
