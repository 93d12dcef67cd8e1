"""One trial, stage by stage: plan → screen → build → measure → Score.

The screen scores the compressed model in memory, shard by shard, before anything is written or any engine
starts: a shard's value is w_perf · PerfNorm(shard) + w_speed · SpeedNorm(predicted from weight bytes). Only
plans that survive it are built and measured. A plan that was measured before, in this study or another under
the same circumstances, is neither built nor measured again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch

from compressors.errors import CompressionError, InfeasiblePlan
from compressors.files import write_json
from compressors.plan import CompressionPlan
from evaluator import quality, score
from evaluator.errors import EngineOutOfMemory, EvaluationError, NotFinite
from evaluator.measurement import METRICS, Measurement
from search import processes
from search.files import read_json
from search.stages.bench import Bench
from search.stages.screen import Screen, mean_known, read_screen, screen_of_shards
from search.study import dashboard, samplers, space, trials
from search.study.record import Record


class TrialFailed(Exception):
    """A trial that can't be built or measured; the study goes on."""


class Objective:
    """Optuna's objective for one worker."""

    def __init__(
        self,
        bench: Bench,
        baseline: Measurement,
        on_stage: Callable[[Record], None] = lambda _: None,
        on_end: Callable[[Record], None] = lambda _: None,
        interruptible: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """interruptible: what is around the trial's work, and not around what is recorded of it."""
        self.bench = bench
        self.setting = bench.setting
        self.baseline = baseline
        self.on_stage = on_stage
        self.on_end = on_end
        self.interruptible = interruptible
        self._stage_since = 0.0

    def __call__(self, trial: optuna.Trial) -> float:
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
        except (CompressionError, EvaluationError) as error:
            record.failure, record.reason = type(error).__name__, str(error)
            raise TrialFailed(record.reason) from error
        except torch.OutOfMemoryError as error:
            record.failure, record.reason = EngineOutOfMemory.__name__, f"screen: {str(error).splitlines()[0]}"
            raise TrialFailed(record.reason) from None
        except MemoryError:
            record.failure, record.reason = EngineOutOfMemory.__name__, "the machine's memory is exhausted"
            raise TrialFailed(record.reason) from None
        except Exception as error:  # anything else is a defect here or in a library: recorded, and the study goes on
            first = (str(error).splitlines() or [""])[0]
            record.failure, record.reason = type(error).__name__, f"unexpected, at stage {record.stage}: {first}"
            raise TrialFailed(record.reason) from error
        finally:
            self._enter(trial, record, None)
            self._describe(trial, record)
            with contextlib.suppress(OSError):  # a closed terminal is no reason to lose a trial
                self.on_end(record)

    def _run(self, trial: optuna.Trial, record: Record) -> float:
        setting, bench = self.setting, self.bench
        self._enter(trial, record, "plan")
        plan = space.suggest(trial, setting.file.space, setting.identity)
        record.plan = plan
        trial.set_user_attr("plan", plan.to_dict())
        infeasible = setting.infeasible(plan)
        self._constrain(trial, infeasible)
        if infeasible:
            record.reason = f"infeasible: {infeasible}"
            raise optuna.TrialPruned(record.reason)

        measurement_path = setting.outputs / "measurements" / f"{setting.key(plan)}.json"
        screen_path = setting.outputs / "screens" / f"{setting.key(plan)}.json"
        known = read_json(measurement_path)
        record.reused = known is not None
        trial.set_user_attr("checkpoint", setting.plan_digest(plan))
        trial.set_user_attr("measurement", measurement_path.stem)

        self._enter(trial, record, "screen")
        record.screen = self._screen(trial, record, plan, screen_path, prune=known is None)

        if known is None:
            self._enter(trial, record, "build")
            try:
                path, weights_sha256 = bench.build(plan)
            except InfeasiblePlan as error:  # what stays in 16 bits, and so its size, is known now
                record.reason = f"infeasible: {error}"
                raise optuna.TrialPruned(record.reason) from None
            self._enter(trial, record, "measure")
            kl, agreement = mean_known(record.screen.kl), mean_known(record.screen.agreement)
            measured = bench.measure(path, weights_sha256)
            record.measurement = dataclasses.replace(measured, kl_nats_per_token=kl, top1_agreement=agreement)
            write_json(measurement_path, record.measurement.to_dict())
        else:
            record.measurement = Measurement.from_dict(known)
            record.reason = "this plan was measured before: its numbers are used again"
        record.score = score.score_of(record.measurement, self.baseline, setting.formula)
        self._enter(trial, record, "done")
        return record.score.score

    def _screen(self, trial: optuna.Trial, record: Record, plan: CompressionPlan, path: Path, *, prune: bool) -> Screen:
        setting, formula = self.setting, self.setting.formula
        record.predicted_speed_norm = 1.0 - self.bench.predicted_time_ratio(plan)
        known = read_screen(path)
        base = self.bench.base_nll()
        running_mean = samplers.wants_running_mean(setting.file.pruner)
        found: list[quality.ShardQuality] = []
        values: list[float] = []
        for index, shard in enumerate(self.bench.shards(plan, known)):
            if not math.isfinite(shard.nll):
                raise NotFinite(f"screen: the loss on shard {index} is {shard.nll}; this plan breaks the model")
            found.append(shard)
            perf_norm = math.exp(base[index] - shard.nll)
            values.append(formula.weight_perf * perf_norm + formula.weight_speed * record.predicted_speed_norm)
            reported = sum(values) / len(values) if running_mean else values[-1]
            trial.report(reported, step=index + 1)
            self.on_stage(record)
            if prune and trial.should_prune():
                record.screen = screen_of_shards(found)
                record.reason = (
                    f"screen: {sum(values) / len(values):.3f} on {len(values)} of {len(setting.shards)} shards"
                    f"{self._best_there(trial, len(values))}: {setting.file.pruner.name} gives it up"
                )
                raise optuna.TrialPruned(record.reason)
        screen = screen_of_shards(found)
        if known is None:
            write_json(path, dataclasses.asdict(screen))
        return screen

    def _best_there(self, trial: optuna.Trial, shards: int) -> str:
        """What the best trial had on the same shards, in the same screen: its Score itself was measured later."""
        try:
            best = trial.study.best_trial
        except ValueError:
            return ""
        there = [best.intermediate_values[step] for step in range(1, shards + 1) if step in best.intermediate_values]
        if not there:
            return ""
        mean = there[-1] if samplers.wants_running_mean(self.setting.file.pruner) else sum(there) / len(there)
        return f", where trial {best.number} (Score {best.value:.3f}) had {mean:.3f}"

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
        """The numbers as trial attributes, the note and the measurement file for the dashboard."""
        for name, value in attributes(record).items():
            trial.set_user_attr(name, value)
        try:
            dashboard.describe_trial(trial, record, self.baseline, self.setting.outputs / "artifacts")
        except OSError as error:  # a full disk: the numbers are in the storage, only the file is missing
            self.bench.say(f"trial {record.number}: no artifact: {error.strerror or error}")


def attributes(record: Record) -> dict[str, Any]:
    """Flat numbers that the dashboard can sort by, and what resuming and exporting need."""
    found: dict[str, Any] = {"seconds": {stage: round(s, 3) for stage, s in record.seconds.items()}}
    if record.reason:
        found["reason"] = record.reason
    if record.failure:
        found["failure"] = record.failure
    if record.reused:
        found["reused"] = True
    if record.predicted_speed_norm is not None:
        found["predicted_speed_norm"] = record.predicted_speed_norm
    if record.measurement is not None and record.score is not None:
        measured = record.measurement
        found |= {
            "perf_norm": record.score.perf_norm,
            "perf_norm_se": record.score.perf_norm_se,
            "speed_norm": record.score.speed_norm,
            "speed_norm_se": record.score.speed_norm_se,
            "score_se": record.score.score_se,
            **{name: getattr(measured, name) for name, metric in METRICS.items() if metric.attribute},
        }
    return {name: value for name, value in found.items() if value is not None}
