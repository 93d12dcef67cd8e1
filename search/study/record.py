"""What a trial says of itself while it runs."""

from __future__ import annotations

import dataclasses

from compressors.plan import CompressionPlan
from evaluator import score
from evaluator.measurement import Measurement
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
