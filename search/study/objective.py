"""One trial, rung by rung: plan → forecast → cheap screen → screen → build → measure → Score.

A trial is pruned at the rung that decides, and each rung is reported to Optuna, see `search.study.rungs`. The forecast
comes from the study's tables, if they are there. The cheap screen is for plans whose own repair takes long.

The screen scores the compressed model in memory, shard by shard, before anything is written or any engine starts. A
shard's value is w_perf · PerfNorm(shard) + w_speed · SpeedNorm(predicted from weight bytes). Only plans that survive it
are built and measured. A plan that was measured before under the same circumstances, in any study, is neither built
nor measured again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable

import optuna
import torch

from compressors.errors import CompressionError, InfeasiblePlan, MachineError
from compressors.plan import CompressionPlan
from evaluator import quality, score, speed
from evaluator.errors import EngineOutOfMemory, EvaluationError, NotFinite
from evaluator.measurement import Measurement
from search import failures, processes, secrets, stages
from search.errors import StudyStopped, no_space
from search.say import Say
from search.setup import keys
from search.stages import baseline as base_stage
from search.stages import cheap_screen, measurements, screen
from search.stages.bench import Bench
from search.stages.forecast import Forecast, hoped
from search.stages.screen import Screen, with_screen
from search.study import dashboard, rungs, samplers, space, trials
from search.study.forecast_sampler import NOTHING_LEFT
from search.study.record import Record


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
        self.forecast = forecast or Forecast.known(bench.setting)
        self._stage_since = 0.0

    def __call__(self, trial: optuna.Trial) -> float:
        """Run the trial and return its Score; raises optuna.TrialPruned or TrialFailed."""
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
        self._constrain(trial, infeasible)
        if infeasible:
            record.reason = f"infeasible: {infeasible}"
            raise optuna.TrialPruned(record.reason)
        if plan == setting.model.identity:
            return self._base_model(trial, record)
        path = setting.outputs / "measurements" / f"{keys.measurement_key(setting, plan)}.json"
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
        record.score = score.score_of(record.measurement, self.baseline, setting.formula)
        trial.report(record.score.score, step=rungs.measured(self._shards))
        self._enter(trial, record, "done")
        return record.score.score

    @property
    def _shards(self) -> int:
        return len(self.setting.texts.shards)

    @property
    def _may_prune(self) -> bool:
        """Whether a plan may end before its screen: not where nobody wants it, nor by text alone where tasks count."""
        return self.setting.file.pruner.name != "none" and not self.setting.tasks

    def _base_model(self, trial: optuna.Trial, record: Record) -> float:
        """Return the Score that the base model has by definition.

        It is not measured again, or noise would put it above plans that differ. Its shards are reported for pruners.
        """
        for step in range(1, self._shards + 1):
            trial.report(self.setting.formula.weight_perf, step=step)
        record.predicted_speed_norm = 0.0
        record.measurement = base_stage.as_trial(self.baseline)
        record.score = score.score_of(record.measurement, self.baseline, self.setting.formula)
        self._enter(trial, record, stages.BASE)
        return record.score.score

    def _queued_again(self, trial: optuna.Trial, fault: failures.Fault) -> bool:
        """Return whether the plan is tried again: always if the machine failed, else as often as retries are left."""
        if fault is failures.Fault.PERHAPS_MACHINE:
            return trials.may_be_tried_again(trial.storage.get_trial(trial._trial_id))
        return fault is failures.Fault.MACHINE

    def _foresee(self, trial: optuna.Trial, record: Record, plan: CompressionPlan, *, prune: bool) -> None:
        """Report the forecast Score; prune a plan that is forecast to stay below the best trial."""
        if not self.forecast.complete:
            return
        self._enter(trial, record, "forecast")
        expected = self.forecast.expected(plan)
        record.forecast = expected
        trial.report(expected.score, step=rungs.FORECAST)
        attributes = trial.storage.get_trial(trial._trial_id).system_attrs
        if NOTHING_LEFT in attributes:
            record.reason = f"forecast: no plan is left that could win: {attributes[NOTHING_LEFT]}"
            raise optuna.TrialPruned(record.reason)
        # the forecast's own sampler knows more of what it proposes: what trials have shown
        proposed = self.setting.file.sampler.name == "forecast" and "fixed_params" not in attributes
        if prune and not proposed:
            self._require_chance(trial, record, "forecast", expected)

    def _cheap_screen(self, trial: optuna.Trial, record: Record, plan: CompressionPlan) -> None:
        """Look at the cut alone, with a repair that takes no time, before the plan's own repair is paid for."""
        quick = cheap_screen.cut_alone(plan, self.setting.model.identity)
        if quick is None or not self._may_prune or _best(trial.study) is None:
            return
        self._enter(trial, record, "cheap screen")
        gains = self.bench.screener.cheap(quick, self.say).lost(self.bench.base_nll(self.say))
        if not all(map(math.isfinite, gains)):
            raise NotFinite("cheap screen: the loss is NaN or infinite; this plan breaks the model")
        record.cheap_loss = sum(gains) / len(gains)
        loss, loss_se = self._gain(trial.study).loss(record.cheap_loss, score.standard_error(gains))
        expected = self.forecast.of_loss(plan, loss + self._of_precision(plan), loss_se)
        trial.report(expected.score, step=rungs.cheap(self._shards))
        self._require_chance(trial, record, "cheap screen", expected)

    def _gain(self, study: optuna.Study) -> cheap_screen.Gain:
        """Return what the trials so far show of the plans' own repair."""
        both = []
        for trial in study.get_trials(deepcopy=False):
            known = trial.user_attrs
            if {"cheap_loss", "loss", "plan"} <= known.keys():
                of_precision = self._of_precision(CompressionPlan.from_dict(known["plan"]))
                both.append((known["cheap_loss"], known["loss"] - of_precision))
        return cheap_screen.Gain.learnt(both)

    def _of_precision(self, plan: CompressionPlan) -> float:
        return 0.0 if self.forecast.damage is None else self.forecast.damage.of_precision(plan)

    def _require_chance(self, trial: optuna.Trial, record: Record, rung: str, expected: score.Score) -> None:
        """Prune a plan that is expected to stay below the best trial, whatever the error of that."""
        best = _best(trial.study) if self._may_prune else None
        if best is not None and hoped(expected) < (best.value or 0.0):
            record.reason = (
                f"{rung}: Score {expected.score:.3f} ± {expected.score_se:.3f} (PerfNorm {expected.perf_norm:.3f}, "
                f"SpeedNorm {expected.speed_norm:.3f}) can't reach trial {best.number}'s {best.value:.3f}"
            )
            raise optuna.TrialPruned(record.reason)

    def _enough(self, trial: optuna.Trial, its_screen: Screen, base: tuple[float, ...]) -> speed.Enough:
        """Return when the timing may end: its error is small enough, or the plan has lost to the best trial."""
        formula, enough = self.setting.formula, self.setting.enough
        if enough == speed.ALL_TURNS:
            return enough
        best, lost = _best(trial.study), None
        if best is not None and best.value is not None and not self.setting.tasks:
            perf_norm = math.exp(sum(base) / len(base) - sum(its_screen.nll) / len(its_screen.nll))
            lost = 1.0 - (best.value - formula.weight_perf * perf_norm) / formula.weight_speed
        return dataclasses.replace(enough, lost_above=lost)

    def _measure(self, trial: optuna.Trial, record: Record, plan: CompressionPlan, its_screen: Screen) -> Measurement:
        self._enter(trial, record, "build")
        try:
            path, weights_sha256 = self.bench.build(plan, self.say)
        except InfeasiblePlan as error:  # what stays in 16 bits, and so its size, is known now
            record.reason = f"infeasible: {error}"
            raise optuna.TrialPruned(record.reason) from None
        self._enter(trial, record, "measure")
        enough = self._enough(trial, its_screen, self.bench.base_nll(self.say))
        measured = self.bench.measure(path, weights_sha256, self.baseline, self.say, enough=enough)
        return with_screen(measured, its_screen)

    def _screen(self, trial: optuna.Trial, record: Record, plan: CompressionPlan, *, prune: bool) -> Screen:
        setting, formula = self.setting, self.setting.formula
        record.predicted_speed_norm = 1.0 - self.forecast.time_ratio(plan)[0]
        path = screen.path_of(setting, plan)
        known = Screen.read(path, self._shards)
        base = self.bench.base_nll(self.say)
        running_mean = samplers.wants_running_mean(setting.file.pruner)
        shards: Iterable[quality.ShardQuality] = self.bench.shards(plan, self.say) if known is None else known.shards()
        scored: list[quality.ShardQuality] = []
        values = record.shard_values
        for index, shard in enumerate(shards):
            if not math.isfinite(shard.nll):
                raise NotFinite(f"screen: the loss on shard {index} is {shard.nll}; this plan breaks the model")
            scored.append(shard)
            record.loss = sum(each.nll - own for each, own in zip(scored, base, strict=False)) / len(scored)
            perf_norm = math.exp(base[index] - shard.nll)
            values.append(formula.weight_perf * perf_norm + formula.weight_speed * record.predicted_speed_norm)
            trial.report(sum(values) / len(values) if running_mean else values[-1], step=index + 1)
            self.on_stage(record)
            if prune and trial.should_prune():
                record.screen = Screen.of(scored)
                record.reason = (
                    f"screen: {sum(values) / len(values):.3f}{self._best_of(trial, len(values))} "
                    f"({len(values)} of {self._shards} shards, {setting.file.pruner.name})"
                )
                self._report_mean(trial, record)
                raise optuna.TrialPruned(record.reason)
        made = Screen.of(scored)
        if known is None:
            made.write(path)
        self._report_mean(trial, record)
        return made

    def _best_of(self, trial: optuna.Trial, shards: int) -> str:
        """What the best trial had on the same shards in the same screen; its Score itself was measured later."""
        best = _best(trial.study)
        if best is None:
            return ""
        seen = rungs.of_shards(best.intermediate_values, shards)
        values = [seen[step] for step in sorted(seen)]
        if not values:
            return ""
        mean = values[-1] if samplers.wants_running_mean(self.setting.file.pruner) else sum(values) / len(values)
        return f" against {mean:.3f} of trial {best.number}"

    def _report_mean(self, trial: optuna.Trial, record: Record) -> None:
        """Report the mean over the shards: Optuna makes the last value that of a pruned trial."""
        values = record.shard_values
        trial.report(sum(values) / len(values), step=rungs.screened(self._shards))

    def _constrain(self, trial: optuna.Trial, infeasible: str | None) -> None:
        value = 1.0 if infeasible else 0.0
        if "feasible" not in trial.constraints:  # a retried trial keeps the value it had
            trial.set_constraint("feasible", value)
        # optuna-dashboard 0.21 reads only the list that constraints_func used to leave
        trial.storage.set_trial_system_attr(trial._trial_id, "constraints", [value])

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


def _best(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    try:
        return study.best_trial
    except ValueError:
        return None


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
