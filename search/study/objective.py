"""One trial, rung by rung: plan → forecast → cheap screen → screen → build → measure → value.

A trial is pruned at the rung that decides, and each rung is reported to Optuna, see `search.study.rungs`. The forecast
comes from the study's tables, if they are there. The cheap screen is for plans whose own repair takes long. The screen
scores the compressed model in memory, see `search.study.screening`. Only plans that survive it are built and measured.
A measured plan answers a few questions before the others, see `search.study.first_answers`.
A plan that was measured before under the same circumstances, in any study, is neither built nor measured again.

What a trial's value is, and what it must reach, is the study's goal (`search.setup.goal`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import torch

from compressors.errors import CompressionError, InfeasiblePlan, MachineError
from compressors.plan import CompressionPlan
from evaluator import lengths, score, speed
from evaluator.errors import EngineOutOfMemory, EvaluationError
from evaluator.measure import Partial
from evaluator.measurement import Measurement
from search import failures, processes, secrets, stages
from search.errors import StudyStopped, no_space
from search.say import Say
from search.setup import keys
from search.setup.goal import Known
from search.stages import baseline as base_stage
from search.stages import cheap_screen, measure, measurements
from search.stages.bench import Bench
from search.stages.damage_curves import ASSUMED
from search.stages.forecast import Forecast
from search.stages.screen import Screen, with_screen
from search.study import best, chance, constraints, dashboard, first_answers, rungs, space, trials
from search.study.forecast_sampler import NOTHING_LEFT, WAITS, ForecastSampler
from search.study.record import Record
from search.study.screening import Screening

SLOW = 0.03  # of the base model's time: what one process of ten was too slow by at least, on an H100


class TrialFailed(Exception):
    """A trial that can't be built or measured; the study continues."""


class Objective:
    """Optuna's objective for one worker."""

    def __init__(
        self,
        bench: Bench,
        baseline: Measurement,
        say: Say,
        on_stage: Callable[[Record], None] = lambda record: None,
        on_end: Callable[[Record], None] = lambda record: None,
        interruptible: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        forecast: Forecast | None = None,
    ) -> None:
        """Prepare the objective.

        Args:
            bench: The worker's bench.
            baseline: The base model's measurement.
            say: Told what is done.
            on_stage: Told of a trial whenever it enters a stage, and after each shard.
            on_end: Told of a trial that has ended.
            interruptible: Context manager that is left before results are recorded.
            forecast: The study's forecast; None: that of the tables that are there.
        """
        self.bench = bench
        self.setting = bench.setting
        self.baseline = baseline
        self.say = say
        self.on_stage = on_stage
        self.on_end = on_end
        self.interruptible = interruptible
        known = forecast or Forecast.known(bench.setting)
        self.forecast = dataclasses.replace(known, most_of_tasks=score.most_of_tasks(baseline))
        self.goal = bench.setting.goal
        self._stage_since = 0.0

    def __call__(self, trial: optuna.Trial) -> float:
        """Run the trial and return its value; raises optuna.TrialPruned or TrialFailed."""
        record = Record(number=trial.number)
        self._stage_since = time.monotonic()
        trial.set_user_attr("worker", processes.identify_worker())
        try:
            with self.interruptible():
                return self._run(trial, record)
        except optuna.TrialPruned:
            raise
        except KeyboardInterrupt:
            record.failure, record.reason = trials.INTERRUPTED, "stopped by the user; it will be tried again"
            raise
        except Exception as error:
            full = no_space(error)
            if full is not None:  # no plan's fault: the trial is tried again when there is space
                record.failure, record.reason = trials.INTERRUPTED, full
                raise StudyStopped(full) from error
            record.failure, reason = _why(error, record.stage)
            record.reason = secrets.masked(reason)
            record.fault = failures.fault_of(error)
            if self._queued_again(trial, record.fault):
                record.again, record.reason = True, f"{record.reason}; it is tried again"
            raise TrialFailed(record.reason) from error
        finally:
            self._enter(trial, record, None)
            self._describe(trial, record)
            with contextlib.suppress(OSError):  # a closed terminal is no reason to lose a trial
                self.on_end(record)

    def _run(self, trial: optuna.Trial, record: Record) -> float:
        setting = self.setting
        self._enter(trial, record, "plan")
        plan = space.suggest(trial, setting.file.space, setting.model.identity)
        record.plan = plan
        trial.set_user_attr("plan", plan.to_dict())
        infeasible = setting.infeasible(plan)
        constraints.of_plan(trial, infeasible)
        if infeasible:
            record.reason = f"infeasible: {infeasible}"
            raise optuna.TrialPruned(record.reason)
        if plan == setting.model.identity:
            return self._base_model(trial, record)
        path = measurements.path_of(setting, plan)
        known = measurements.known(path, setting)
        record.reused = known is not None
        trial.set_user_attr("checkpoint", keys.plan_digest(setting, plan))
        trial.set_user_attr("measurement", path.stem)
        self._foresee(trial, record, plan, prune=known is None)
        if known is None:
            self._cheap_screen(trial, record, plan)
        self._enter(trial, record, "screen")
        record.screen = self._screen(trial, record, plan, prune=known is None)
        if known is None:
            record.measurement = self._measure(trial, record, plan, record.screen)
            measurements.keep(path, record.measurement)
        else:
            record.measurement = known
            record.reason = "this plan was measured before: its numbers are used again"
        value = self._judge(trial, record, record.measurement)
        trial.report(value, step=rungs.measured(self._shards))
        self._enter(trial, record, "done")
        return value

    def _judge(self, trial: optuna.Trial, record: Record, measured: Measurement) -> float:
        """Return the value of a measurement, and store how far it is from the goal's bounds."""
        measured = lengths.with_ratio(measured, self.baseline)
        record.measurement = measured
        record.length_flag = self.setting.length_warning(measured, self.baseline)
        record.score = score.score_of(measured, self.baseline, self.setting.formula)
        record.goal = self.goal
        record.known = Known(record.score, measured.model_size_mb / self.baseline.model_size_mb)
        constraints.of_goal(trial, self.goal, record.known)
        return self.goal.value(record.known)

    @property
    def _shards(self) -> int:
        return len(self.setting.texts.shards)

    @property
    def _may_prune(self) -> bool:
        """Whether a plan may end before it is measured: not where nobody wants it."""
        return self.setting.file.pruner.name != "none"

    def _base_model(self, trial: optuna.Trial, record: Record) -> float:
        """Return the value that the base model has by definition.

        It is not measured again, or noise would put it above plans that differ. Its shards are reported for pruners.
        """
        for step in range(1, self._shards + 1):
            trial.report(self.setting.formula.weight_perf if self.goal.is_score else 1.0, step=step)
        record.predicted_speed_norm = 0.0
        value = self._judge(trial, record, base_stage.as_trial(self.baseline))
        self._enter(trial, record, stages.BASE)
        return value

    def _queued_again(self, trial: optuna.Trial, fault: failures.Fault) -> bool:
        """Return whether the plan is tried again: always if the machine failed, else as often as retries are left."""
        if fault is failures.Fault.PERHAPS_MACHINE:
            return trials.may_be_tried_again(trial.storage.get_trial(trial._trial_id))
        return fault is failures.Fault.MACHINE

    def _foresee(self, trial: optuna.Trial, record: Record, plan: CompressionPlan, *, prune: bool) -> None:
        """Report the forecast value; prune a plan that is forecast to miss a bound, or to stay below the best trial."""
        known = self.forecast.known_of(plan)
        told = self.goal.is_told(known)
        if not (self.forecast.complete or (told and not self.goal.is_default)):
            return
        self._enter(trial, record, "forecast")
        if self.forecast.complete:
            record.forecast = self.forecast.expected(plan)
        if self.forecast.complete or math.isfinite(self.goal.value_se(known)):
            trial.report(self.goal.value(known), step=rungs.FORECAST)
        attributes = trial.storage.get_trial(trial._trial_id).system_attrs
        if NOTHING_LEFT in attributes:
            record.reason = f"forecast: no plan is left that could win: {attributes[NOTHING_LEFT]}"
            raise optuna.TrialPruned(record.reason)
        possible = self.forecast.possible(plan)
        if self.setting.file.sampler.name == "forecast" and "fixed_params" not in attributes:
            possible = possible.without_forecast()  # the sampler knows more of what it proposes: what trials have shown
        if prune:
            self._require_chance(trial, record, "forecast", possible)

    def _cheap_screen(self, trial: optuna.Trial, record: Record, plan: CompressionPlan) -> None:
        """Look at the cut alone, with a repair that takes no time, before the plan's own repair is paid for."""
        quick = cheap_screen.cut_alone(plan, self.setting.model.identity)
        may_end = self.goal.bound("perf_norm") is not None or best.to_beat(trial.study) is not None
        if quick is None or not self._may_prune or self.setting.tasks or not may_end:
            return
        self._enter(trial, record, "cheap screen")
        gains = self.bench.screener.cheap(quick, self.say).lost(self.bench.base_nll(self.say))
        record.cheap_loss = sum(gains) / len(gains)
        loss, loss_se = self._gain(trial.study, plan).loss(record.cheap_loss, score.standard_error(gains))
        expected = self.forecast.of_loss(plan, loss + self._of_precision(plan), loss_se)
        known = self.forecast.known_of(plan, expected)
        trial.report(self.goal.value(known), step=rungs.cheap(self._shards))
        self._require_chance(trial, record, "cheap screen", known)
        self._may_wait(trial, record)

    def _may_wait(self, trial: optuna.Trial, record: Record) -> None:
        """End a trial after its cheap screen if another plan promises more: this one may be proposed again."""
        seen = trial.storage.get_trial(trial._trial_id)
        by_sampler = self.setting.file.sampler.name == "forecast" and "fixed_params" not in seen.system_attrs
        if not by_sampler or not self.goal.is_default:
            return
        seed = len(trials.finished(trial.study.get_trials(deepcopy=False)))  # the same after a kill, unlike the number
        why = ForecastSampler(self.forecast, seed).promises_more(trial.study, seen)
        if why is not None:
            trial.storage.set_trial_system_attr(trial._trial_id, WAITS, why)
            record.reason = f"cheap screen: {why}"
            raise optuna.TrialPruned(record.reason)

    def _gain(self, study: optuna.Study, plan: CompressionPlan) -> cheap_screen.Gain:
        """Return what the plan's repair gains, as the damage table and the trials so far have it."""
        seen = []
        for trial in trials.finished(study.get_trials(deepcopy=False)):
            known = trial.user_attrs
            if {"cheap_loss", "loss", "plan"} <= known.keys() and known["plan"]["repair"] == plan.repair:
                other = CompressionPlan.from_dict(known["plan"])
                seen.append((self._foretold(other), known["cheap_loss"], known["loss"] - self._of_precision(other)))
        return cheap_screen.Gain.learnt(self._foretold(plan), seen)

    def _foretold(self, plan: CompressionPlan) -> float:
        """Return the share of the loss in the cheap screen that the plan's own repair is foretold to leave."""
        quick, table = cheap_screen.cut_alone(plan, self.setting.model.identity), self.forecast.damage
        share = None if quick is None or table is None else table.share(plan, quick)
        return ASSUMED[plan.repair] if share is None else share

    def _of_precision(self, plan: CompressionPlan) -> float:
        return 0.0 if self.forecast.damage is None else self.forecast.damage.of_precision(plan)

    def _require_chance(self, trial: optuna.Trial, record: Record, rung: str, known: Known) -> None:
        """Prune a plan that is expected to miss a bound or to stay below the trial to beat, whatever the error."""
        if not self._may_prune:
            return
        why = chance.why_none(self.goal, known, best.to_beat(trial.study))
        if why is not None:
            record.reason = f"{rung}: at best, {why}" if self.setting.tasks else f"{rung}: {why}"
            constraints.of_goal(trial, self.goal, known)
            raise optuna.TrialPruned(record.reason)

    def _enough(self, trial: optuna.Trial, its_screen: Screen, base: tuple[float, ...]) -> speed.Enough:
        """Return when the timing may end: its error is small enough, or the plan has lost to the best trial."""
        file, formula, perf_norm = self.setting.file, self.setting.formula, None
        wanted = self.goal.time_ratio_se(file.evaluation.score_se, formula.weight_speed)
        if not wanted:
            return speed.ALL_TURNS
        if not self.setting.tasks:
            perf_norm = math.exp(sum(base) / len(base) - sum(its_screen.nll) / len(its_screen.nll))
        leader = best.to_beat(trial.study)
        value = None if leader is None else leader.value
        lost = self.goal.lost_above(value, perf_norm, (formula.weight_perf, formula.weight_speed))
        return speed.Enough(wanted, lost)

    def _suspect_above(self, plan: CompressionPlan, enough: speed.Enough) -> float | None:
        """Return the time ratio that the speed table calls too long to be true; None where that decides nothing."""
        if self.forecast.speed is None:
            return None
        ratio, error = self.forecast.time_ratio(plan)
        if enough.lost_above is not None and ratio > enough.lost_above:
            return None  # it loses at the forecast time, too
        return ratio + max(SLOW, speed.SURE * error)

    def _measure(self, trial: optuna.Trial, record: Record, plan: CompressionPlan, its_screen: Screen) -> Measurement:
        self._enter(trial, record, "build")
        try:
            path, weights_sha256 = self.bench.build(plan, self.say)
        except InfeasiblePlan as error:  # what stays in 16 bits, and so its size, is known now
            record.reason = f"infeasible: {error}"
            raise optuna.TrialPruned(record.reason) from None
        if self.goal.objective == "size" and plan.keep_16_bit:  # its size is known only now
            built = Known(self.forecast.known_of(plan).score, measure.size_ratio_of(self.setting, path))
            self._require_chance(trial, record, "build", built.without_forecast())
        self._enter(trial, record, "measure")
        enough = self._enough(trial, its_screen, self.bench.base_nll(self.say))
        measured = self.bench.measure(
            path,
            weights_sha256,
            self.baseline,
            self.say,
            enough=enough,
            suspect_above=self._suspect_above(plan, enough),
            first_answers=lambda known: self._require_answers(trial, record, path, known),
        )
        return with_screen(measured, its_screen)

    def _require_answers(self, trial: optuna.Trial, record: Record, path: Path, known: Partial) -> None:
        """Prune a plan that can't answer any more, and can't win without; see `search.study.first_answers`."""
        lost = first_answers.lost(known, self.baseline) if self._may_prune else None
        if lost is None:
            return
        best_case = first_answers.at_best(known, self.baseline)
        if not self.setting.file.evaluation.is_timed:
            best_case = measure.with_predicted_time(best_case, measure.predicted_ratio_of(self.setting, path))
        scored = score.score_of(best_case, self.baseline, self.setting.formula)
        possible = Known(scored, measure.size_ratio_of(self.setting, path))
        why = chance.why_none(self.goal, possible, best.to_beat(trial.study))
        if why is not None:
            record.reason = f"answers: {lost}; at best, {why}"
            constraints.of_goal(trial, self.goal, possible)
            trial.report(self.goal.value(possible), step=rungs.measured(self._shards))
            raise optuna.TrialPruned(record.reason)

    def _screen(self, trial: optuna.Trial, record: Record, plan: CompressionPlan, *, prune: bool) -> Screen:
        screening = Screening(self.setting, self.bench, self.forecast, self.say, self.on_stage)
        return screening.screen(trial, record, plan, prune=prune)

    def _enter(self, trial: optuna.Trial, record: Record, stage: str | None) -> None:
        now = time.monotonic()
        record.seconds[record.stage] = record.seconds.get(record.stage, 0.0) + now - self._stage_since
        self._stage_since = now
        if stage is not None:
            record.stage = stage
            trial.set_user_attr("stage", stage)
            self.on_stage(record)

    def _describe(self, trial: optuna.Trial, record: Record) -> None:
        """Store the numbers as trial attributes, the note and the measurement file for the dashboard."""
        for name, value in record.attributes().items():
            trial.set_user_attr(name, value)
        try:
            dashboard.describe_trial(trial, record, self.baseline, self.setting.outputs / "artifacts")
        except OSError as error:  # a full disk: the numbers are in the storage, only the file is missing
            self.say(f"trial {record.number}: no artifact: {error.strerror or error}")


def _why(error: Exception, stage: str) -> tuple[str, str]:
    """The kind of a failure, and its reason in a line."""
    if isinstance(error, CompressionError | EvaluationError):
        return type(error).__name__, str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return EngineOutOfMemory.__name__, f"screen: {secrets.line_of(error)}"
    if isinstance(error, MemoryError):
        return EngineOutOfMemory.__name__, "the machine's memory is exhausted"
    if isinstance(error, OSError):
        named = f": {error.filename}" if error.filename else ""
        return MachineError.__name__, f"{stage}: {error.strerror or secrets.line_of(error)}{named}"
    # anything else is a defect here or in a library: it is recorded, and the study continues
    return type(error).__name__, f"unexpected, at stage {stage}: {secrets.line_of(error)}"
