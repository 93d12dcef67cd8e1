"""The screen of a trial: its model in memory, shard by shard, before anything is written or any engine starts.

What is reported of a shard orders plans as the study's goal does, where text can: for the Score it is
w_perf · PerfNorm(shard) + w_speed · SpeedNorm(predicted), for every other goal PerfNorm(shard). Where the goal is time
or size, PerfNorm does not say which of two plans is better, and the pruner is not asked. Under a goal that bounds
PerfNorm, a plan ends as soon as its PerfNorm stays below the bound by two standard errors. Where times are forecast
with an error, a plan does not end as long as that error leaves it a chance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import optuna

from compressors.plan import CompressionPlan
from evaluator import quality, score
from search.say import Say
from search.setup.goal import Known
from search.setup.setting import Setting
from search.stages import screen
from search.stages.bench import Bench
from search.stages.forecast import Forecast
from search.stages.screen import Screen
from search.study import best, chance, constraints, rungs
from search.study.record import Record

FEW = 2  # shards, below which an error says nothing


@dataclasses.dataclass(frozen=True)
class Screening:
    """Screens plans of one study.

    Attributes:
        setting: What the study shares.
        bench: The worker's bench.
        forecast: The study's forecast, for the predicted SpeedNorm.
        say: Told what is done.
        on_stage: Told of a trial after each shard.
    """

    setting: Setting
    bench: Bench
    forecast: Forecast
    say: Say
    on_stage: Callable[[Record], None]

    def screen(self, trial: optuna.Trial, record: Record, plan: CompressionPlan, *, prune: bool) -> Screen:
        """Return the plan's quality on all shards; raises optuna.TrialPruned where fewer decide."""
        setting = self.setting
        record.predicted_speed_norm = 1.0 - self.forecast.time_ratio(plan)[0]
        path = screen.path_of(setting, plan)
        before = Screen.read(path, self._shards)
        base = self.bench.base_nll(self.say)
        running_mean = rungs.are_running_means(setting.file.pruner)
        shards: Iterable[quality.ShardQuality] = (
            self.bench.shards(plan, self.say) if before is None else before.shards()
        )
        scored: list[quality.ShardQuality] = []
        values, losses = record.shard_values, list[float]()
        for index, shard in enumerate(shards):
            screen.require_finite(index, shard.nll)
            scored.append(shard)
            losses.append(shard.nll - base[index])
            record.loss = sum(losses) / len(losses)
            values.append(self._value(math.exp(base[index] - shard.nll), record.predicted_speed_norm))
            trial.report(sum(values) / len(values) if running_mean else values[-1], step=index + 1)
            self.on_stage(record)
            why = self._why_end(trial, plan, values, losses) if prune else None
            if why is not None:
                record.screen = Screen.of(scored)
                record.reason = f"screen: {why}"
                constraints.of_goal(trial, setting.goal, self._known(plan, losses))
                self.report_mean(trial, record, plan)
                raise optuna.TrialPruned(record.reason)
        made = Screen.of(scored)
        if before is None:
            made.write(path)
        self.report_mean(trial, record, plan)
        return made

    def report_mean(self, trial: optuna.Trial, record: Record, plan: CompressionPlan) -> None:
        """Report the mean over the shards, or the value that is known without them.

        Optuna makes the last value that of a pruned trial.
        """
        values, goal = record.shard_values, self.setting.goal
        value = sum(values) / len(values) if goal.by_text else goal.value(self.forecast.known_of(plan))
        trial.report(value, step=rungs.screened(self._shards))

    @property
    def _shards(self) -> int:
        return len(self.setting.texts.shards)

    def _value(self, perf_norm: float, speed_norm: float) -> float:
        formula = self.setting.formula
        if not self.setting.goal.is_score:
            return perf_norm
        return formula.weight_perf * perf_norm + formula.weight_speed * speed_norm

    def _known(self, plan: CompressionPlan, losses: Sequence[float]) -> Known:
        """Return what a plan may reach, after so many shards, each by its loss in nats per token."""
        return self.forecast.possible(plan, self._expected(plan, losses))

    def _expected(self, plan: CompressionPlan, losses: Sequence[float]) -> score.Score:
        return self.forecast.of_loss(plan, sum(losses) / len(losses), score.standard_error(losses))

    def _why_end(
        self, trial: optuna.Trial, plan: CompressionPlan, values: Sequence[float], losses: Sequence[float]
    ) -> str | None:
        """Say why the trial ends here; None where it goes on."""
        goal, pruner = self.setting.goal, self.setting.file.pruner
        bounded = goal.bound("perf_norm") is not None and pruner.name != "none"
        if bounded and len(losses) >= max(FEW, pruner.n_startup_steps):
            known = self._known(plan, losses)
            missed = chance.misses(goal, known)
            if missed is None and len(losses) == self._shards and not self.setting.tasks:
                missed = chance.misses_as_screened(goal, known)
            if missed is not None:
                return f"{missed} ({len(losses)} of {self._shards} shards)"
        if goal.by_text and trial.should_prune() and not self._may_still_win(trial, plan, losses):
            named = "" if goal.is_score else "PerfNorm "
            return (
                f"{named}{sum(values) / len(values):.3f}{self._best_of(trial, len(values))} "
                f"({len(values)} of {self._shards} shards, {pruner.name})"
            )
        return None

    def _may_still_win(self, trial: optuna.Trial, plan: CompressionPlan, losses: Sequence[float]) -> bool:
        """Return whether what the pruner does not know leaves the plan a chance.

        That is the error of the forecast time, what no text tells, and that the trial it compares with may hold the
        goal's bounds by luck.
        """
        leader = best.to_beat(trial.study)
        if leader is None:
            return bool(self.setting.goal.bounds)
        possible = self.forecast.possible(plan, self._expected(plan, losses), by_bytes=True)
        return self.setting.goal.can_beat(possible, leader.value or 0.0)

    def _best_of(self, trial: optuna.Trial, shards: int) -> str:
        """What the best trial had on the same shards in the same screen; its value itself was measured later."""
        leader = best.best_trial(trial.study)
        if leader is None:
            return ""
        seen = rungs.of_shards(leader.intermediate_values, shards)
        values = [seen[step] for step in sorted(seen)]
        if not values:
            return ""
        mean = values[-1] if rungs.are_running_means(self.setting.file.pruner) else sum(values) / len(values)
        return f" against {mean:.3f} of trial {leader.number}"
