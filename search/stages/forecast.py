"""The forecast of a study: the Score of any plan of the space, with its error, before it is built.

PerfNorm comes from the damage table, SpeedNorm from the speed table.
"""

from __future__ import annotations

import dataclasses
import math

from compressors.plan import CompressionPlan
from evaluator.score import Score
from evaluator.speed_table import SpeedTable
from search.setup.setting import Setting
from search.stages import damage_table, measure, speed_table
from search.stages.damage_table import DamageTable

BYTES_ERROR = 0.1  # of a time ratio that is predicted from bytes and layers, see evaluator.speed


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Forecasts plans of one study.

    Attributes:
        setting: What the study shares.
        speed: The speed table; None: times are predicted from bytes and layers.
        damage: The damage table; None: nothing is known of PerfNorm, which is then forecast as 1.
    """

    setting: Setting
    speed: SpeedTable | None
    damage: DamageTable | None

    @classmethod
    def known(cls, setting: Setting) -> Forecast:
        """Return the forecast from the tables that are there."""
        return cls(setting, speed_table.known(setting), damage_table.known(setting))

    def time_ratio(self, plan: CompressionPlan) -> tuple[float, float]:
        """Return the time per token over the base model's, and its standard error."""
        if self.speed is None or self.setting.file.evaluation.speed != "measured":
            return measure.predicted_ratio(self.setting, plan), BYTES_ERROR
        return self.speed.time_ratio(speed_table.shape_of(self.setting, plan))

    def expected(self, plan: CompressionPlan) -> Score:
        """Return what the plan is forecast to score."""
        loss, loss_se = (0.0, 0.0) if self.damage is None else self.damage.loss(plan)
        ratio, ratio_se = self.time_ratio(plan)
        perf_norm = math.exp(-loss)
        formula = self.setting.formula
        value = formula.weight_perf * perf_norm + formula.weight_speed * (1.0 - ratio)
        error = math.hypot(formula.weight_perf * perf_norm * loss_se, formula.weight_speed * ratio_se)
        return Score(perf_norm, perf_norm * loss_se, 1.0 - ratio, ratio_se, max(value, 0.0), error)
