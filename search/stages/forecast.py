"""The forecast of a study: the Score of any plan of the space, with its error, before it is built.

PerfNorm comes from the damage table, SpeedNorm from the speed table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from compressors.plan import CompressionPlan
from evaluator.score import PERPLEXITY, Score
from evaluator.speed_table import SpeedTable
from search.setup.goal import Known
from search.setup.setting import Setting
from search.stages import damage_table, measure, speed_table
from search.stages.damage_table import DamageTable

LEAST_RATIO_ERROR = 0.005
BYTES_ERROR = 0.1  # of a time ratio that is predicted from bytes and layers, see evaluator.speed
STAND_IN_ERROR = 0.05  # of a server's time ratio that is taken from engines, until trials show it


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Forecasts plans of one study.

    Attributes:
        setting: What the study shares.
        speed: The speed table; None: times are predicted from bytes and layers.
        damage: The damage table; None: nothing is known of PerfNorm, which is then forecast as 1.
        relative_error: The relative error of the damage table's losses, as far as trials have shown it.
        ratio_error: The error of the speed table's time ratios, as far as trials have shown it; None: the table's own.
        most_of_tasks: The most that each task of Perf can give, over the base model's, see `evaluator.score`.
    """

    setting: Setting
    speed: SpeedTable | None
    damage: DamageTable | None
    relative_error: float = damage_table.RELATIVE_ERROR
    ratio_error: float | None = None
    most_of_tasks: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def known(cls, setting: Setting) -> Forecast:
        """Return the forecast from the tables that are there."""
        return cls(setting, speed_table.known(setting), damage_table.known(setting))

    @property
    def complete(self) -> bool:
        """Whether PerfNorm, and SpeedNorm where times decide anything, are forecast from measurements."""
        return self.damage is not None and (self.speed is not None or not self.setting.wants_time)

    @property
    def _is_timed(self) -> bool:
        return self.setting.file.evaluation.is_timed

    def time_ratio(self, plan: CompressionPlan) -> tuple[float, float]:
        """Return the time per token over the base model's, and its standard error."""
        if self.speed is None or not self._is_timed:  # a study that times nothing takes the prediction for the result
            return measure.predicted_ratio(self.setting, plan), BYTES_ERROR if self._is_timed else 0.0
        ratio, error = self.speed.time_ratio(speed_table.shape_of(self.setting, plan))
        if error == 0.0:  # the base model's own shape
            return ratio, error
        return ratio, self._table_error(self.speed) if self.ratio_error is None else self.ratio_error

    def _table_error(self, table: SpeedTable) -> float:
        """Return the error of the table's time ratios, before any trial has shown it."""
        stands = self.setting.workload.kind == "serve"
        return math.hypot(table.ratio_error, STAND_IN_ERROR) if stands else table.ratio_error

    def expected(self, plan: CompressionPlan) -> Score:
        """Return what the plan is forecast to score."""
        lost = (0.0, 0.0) if self.damage is None else self.damage.loss(plan, self.relative_error)
        return self.of_loss(plan, *lost)

    def known_of(self, plan: CompressionPlan, expected: Score | None = None) -> Known:
        """Return what is known of a plan before it is measured; the error of what no table tells is inf.

        Args:
            plan: The plan.
            expected: What the plan is forecast to score, where its own loss is known; None: as `expected` has it.
        """
        of_text = expected is not None or self.damage is not None
        score = expected or self.expected(plan)
        errors = {}
        if not of_text or self.setting.tasks:  # tasks say what no text does
            errors["perf_norm_se"] = math.inf
        if self.speed is None and self._is_timed:
            errors["speed_norm_se"] = math.inf
        if "perf_norm_se" in errors:
            errors["score_se"] = math.inf
        return Known(dataclasses.replace(score, **errors), self.setting.size_ratio(plan))

    def possible(self, plan: CompressionPlan, expected: Score | None = None, *, by_bytes: bool = False) -> Known:
        """Return what a plan may reach at best before it is measured, with the error of what is foreseen of it.

        Without tasks that is `known_of`. No text tells what a plan answers, so each task counts as the most that it can
        give (`most_of_tasks`), and the part of the text as foreseen.

        Args:
            plan: The plan.
            expected: What the plan is forecast to score, where its own loss is known; None: as `expected` has it.
            by_bytes: Take the time that bytes predict, with its error, where no table tells the time.
        """
        known = self.known_of(plan, expected)
        score, text = known.score, expected or self.expected(plan)
        perf_norm, perf_norm_se = score.perf_norm, score.perf_norm_se
        if self.setting.tasks and self.most_of_tasks:
            parts = dict(self.setting.formula.perf)
            total, of_text = math.fsum(parts.values()), parts.pop(PERPLEXITY, 0.0)
            of_tasks = math.fsum(weight * self.most_of_tasks[name] for name, weight in parts.items())
            perf_norm = (of_text * text.perf_norm + of_tasks) / total
            told = expected is not None or self.damage is not None or of_text == 0.0
            perf_norm_se = of_text / total * text.perf_norm_se if told else math.inf
        speed_norm_se = text.speed_norm_se if by_bytes else score.speed_norm_se
        formula = self.setting.formula
        value = formula.weight_perf * perf_norm + formula.weight_speed * score.speed_norm
        of_perf = formula.weight_perf and formula.weight_perf * perf_norm_se  # what counts for nothing may be unknown
        error = math.hypot(of_perf, formula.weight_speed and formula.weight_speed * speed_norm_se)
        best = Score(perf_norm, perf_norm_se, score.speed_norm, speed_norm_se, max(value, 0.0), error)
        return dataclasses.replace(known, score=best)

    def taught(self, losses: Sequence[tuple[float, float]], ratios: Sequence[tuple[float, float]]) -> Forecast:
        """Return the forecast with the errors that trials show.

        Args:
            losses: The forecast and the screened loss of each trial, in nats per token.
            ratios: The forecast and the measured time ratio of each measured trial.
        """
        learnt = dataclasses.replace(self, relative_error=damage_table.relative_error(losses))
        if self.speed is None:
            return learnt
        own = self._table_error(self.speed)  # counts as one trial
        squares = own**2 + math.fsum((measured - forecast) ** 2 for forecast, measured in ratios)
        return dataclasses.replace(learnt, ratio_error=max(math.sqrt(squares / (1 + len(ratios))), LEAST_RATIO_ERROR))

    def of_loss(self, plan: CompressionPlan, loss: float, loss_se: float) -> Score:
        """Return what the plan is forecast to score if it loses so much, in nats per token."""
        ratio, ratio_se = self.time_ratio(plan)
        perf_norm = math.exp(-loss)
        formula = self.setting.formula
        value = formula.weight_perf * perf_norm + formula.weight_speed * (1.0 - ratio)
        error = math.hypot(formula.weight_perf * perf_norm * loss_se, formula.weight_speed * ratio_se)
        return Score(perf_norm, perf_norm * loss_se, 1.0 - ratio, ratio_se, max(value, 0.0), error)
