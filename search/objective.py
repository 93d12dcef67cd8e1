"""One trial, stage by stage: plan → screen → build → measure → Score.

The screen scores the compressed model in memory, shard by shard, before anything is written or any engine
starts: a shard's value is w_perf · PerfNorm(shard) + w_speed · SpeedNorm(predicted from weight bytes). Only
plans that survive it are built and measured. A plan that was measured before, in this study or another under
the same circumstances, is neither built nor measured again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import torch

from compressors import build, calibration, checkpoint, structure
from compressors.device import release
from compressors.errors import CompressionError, InfeasiblePlan
from compressors.plan import CompressionPlan
from evaluator import measure, quality, score, speed
from evaluator.errors import EngineOutOfMemory, EvaluationError, NotFinite
from evaluator.measurement import Measurement, Timing
from evaluator.process import EngineProcess
from search import compress, dashboard, space, study
from search.errors import UsageError
from search.setting import Setting, read_json, require_disk, require_memory, write_json

BASELINE_RESULT = "baseline_result.json"
BUILDING = ".building-"  # + the worker's pid: where a checkpoint is until it is whole


class TrialFailed(Exception):
    """A trial that can't be built or measured; the study goes on."""


@dataclasses.dataclass(frozen=True)
class Screen:
    """Quality in memory, one entry a shard: mean NLL and KL in nats per token, top-1 agreement with the base."""

    nll: tuple[float, ...]
    kl: tuple[float | None, ...]
    agreement: tuple[float | None, ...]


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


class Bench:
    """A worker's engines and the base model's screen, kept warm from trial to trial. Close it."""

    def __init__(self, setting: Setting, say: Callable[[str], None] = lambda _: None, *, again: bool = False) -> None:
        """again: measure the baseline though its measurement is known."""
        self.setting = setting
        self.say = say
        self.again = again
        self._baseline_engine: EngineProcess | None = None
        self._reference: quality.Reference | None = None
        self._base_nll: tuple[float, ...] | None = None
        self._baseline_measured: Measurement | None = None
        self._calibration: calibration.Calibration | None = None

    def close(self) -> None:
        if self._baseline_engine is not None:
            self._baseline_engine.close()
            self._baseline_engine = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- the base model --------------------------------------------------------------------------------------

    def calibration(self) -> calibration.Calibration:
        if self._calibration is None:
            self._calibration = self.setting.calibrate(self.say)
        return self._calibration

    def baseline(self) -> Measurement:
        """The base model's measurement: made once, kept under what it depends on."""
        if self._baseline_measured is not None:
            return self._baseline_measured
        setting = self.setting
        path = self.baseline_path
        known = None if self.again else read_json(path)
        if known is not None:
            measurement = Measurement.from_dict(known)
        else:
            self.say("baseline: starting the engine")
            engine = self.baseline_engine()
            measurement = measure.measure(
                setting.base_path,
                engine,
                None,
                setting.shards,
                setting.workload,
                time_it=setting.file.evaluation.speed == "measured",
                progress=lambda what: self.say(f"baseline: {what}"),
                tasks=setting.tasks,
            )
            write_json(path, measurement.to_dict())
        write_json(
            setting.outputs / BASELINE_RESULT,
            {
                **measurement.to_dict(),
                "model": {"source": setting.file.model.source, "digest": setting.base_digest},
                "circumstances": setting.circumstances,
            },
        )
        try:
            score.score_of(measurement, measurement, setting.formula)
        except ValueError as error:  # a task of which the base model solves nothing
            raise UsageError(str(error)) from None
        self._baseline_measured = measurement
        return measurement

    @property
    def baseline_path(self) -> Path:
        name = f"{self.setting.base_digest[:12]}-{_key(self.setting.circumstances)}"
        return self.setting.outputs / "baseline" / f"{name}.json"

    def baseline_engine(self) -> EngineProcess:
        """The base model's engine, started when it is first wanted."""
        if self._baseline_engine is None or not self._baseline_engine.alive:
            if self._baseline_engine is not None:
                self._baseline_engine.close()
            self._baseline_engine = self._start(self.setting.base_path, "baseline")
        return self._baseline_engine

    def _start(self, path: Path, name: str) -> EngineProcess:
        setting = self.setting
        return EngineProcess(
            setting.backend, path, setting.engine_settings, log=setting.outputs / "logs" / f"engine-{name}.log"
        )

    # -- screen ----------------------------------------------------------------------------------------------

    def base_nll(self) -> tuple[float, ...]:
        """The base model's mean NLL on each shard, computed in memory as the screen computes every plan's."""
        if self._base_nll is None:
            path = self.setting.outputs / "screens" / f"base-{self.setting.key(self.setting.identity)}.json"
            known = read_json(path)
            if known is None:
                write_json(path, {"nll": self._in_memory_reference().nll})
                known = read_json(path)
            assert known is not None
            self._base_nll = tuple(known["nll"])
        return self._base_nll

    def _in_memory_reference(self) -> quality.Reference:
        if self._reference is None:
            self.say("screen: the base model")
            kept = int(self.setting.file.evaluation.kl_max_mb * 1e6)
            with self._model(self.setting.identity) as model:
                self._reference = quality.Reference.of(model, self.setting.shards, max_bytes=kept)
            if not all(map(math.isfinite, self._reference.nll)):
                raise NotFinite(
                    f"model {self.setting.base_path}: its loss on the search text is NaN: the weights are broken"
                )
        return self._reference

    def shards(self, plan: CompressionPlan, known: Screen | None) -> Iterator[quality.ShardQuality]:
        """The quality of each shard in turn, from what is known or from the model built in memory."""
        if known is not None:
            for nll, kl, agreement in zip(known.nll, known.kl, known.agreement, strict=True):
                yield quality.ShardQuality(nll=nll, tokens=0, kl=kl, agreement=agreement)
            return
        reference = self._in_memory_reference()
        with self._model(plan) as model:
            for index, shard in enumerate(self.setting.shards):
                yield quality.shard_quality(model, shard, reference, index)

    def screen(self, plan: CompressionPlan) -> Screen:
        """Quality on all shards, kept under the plan's key: the numbers that a trial of this plan has."""
        path = self.setting.outputs / "screens" / f"{self.setting.key(plan)}.json"
        known = read_screen(path)
        if known is None:
            self.say("quality in memory")
            known = _screen_of(list(self.shards(plan, None)))
            write_json(path, dataclasses.asdict(known))
        return known

    def screen_of(self, model: Any) -> Screen:
        """The same of a model in memory, on the setting's device, that no plan made."""
        reference = self._in_memory_reference()
        shards = enumerate(self.setting.shards)
        return _screen_of([quality.shard_quality(model, shard, reference, index) for index, shard in shards])

    @contextlib.contextmanager
    def _model(self, plan: CompressionPlan) -> Iterator[Any]:
        setting = self.setting
        simulated = self._applied(plan, simulate=True)
        on_cpu = setting.device == "cpu"
        need = simulated.total_parameters * 4 if on_cpu else simulated.size_bytes
        if plan.repair == "stream":  # beside it, for a while, the base model and the cut one
            need = 2 * need + (setting.base.total_parameters * 4 if on_cpu else setting.base.size_bytes)
        require_memory(need, setting.device, "screening this plan")
        model = simulated.to_model(setting.device, dtype=torch.float32 if on_cpu else None)
        try:
            yield model
        finally:
            del model
            release(setting.device)

    def _applied(self, plan: CompressionPlan, *, simulate: bool = False) -> checkpoint.Checkpoint:
        setting = self.setting
        return build.apply(
            plan,
            setting.base,
            setting.family,
            self.calibration(),
            moments=setting.moments_for(plan, self.say),
            simulate=simulate,
            device=setting.device,
            say=self.say,
        )

    def predicted_time_ratio(self, plan: CompressionPlan) -> float:
        setting = self.setting
        simulated = build.apply(plan, setting.base, setting.family, self.calibration())
        return speed.predicted_time_ratio(
            candidate_bytes=self._served(simulated.decode_bytes, plan.precision),
            base_bytes=self._served(setting.base.decode_bytes, setting.identity.precision),
            layers=plan.num_hidden_layers,
            base_layers=setting.identity.num_hidden_layers,
        )

    # -- build and measure -----------------------------------------------------------------------------------

    def build(self, plan: CompressionPlan, *, limited: bool = True) -> tuple[Path, str]:
        """The checkpoint directory of this plan, and its weights' sha256. limited: by the study's largest size."""
        setting = self.setting
        path = setting.outputs / "checkpoints" / setting.plan_digest(plan)
        known = read_json(path / compress.DESCRIPTION)
        if known is not None:
            return path, str(known["weights_sha256"])
        needed = build.predicted_bytes(plan, setting.base, setting.family)
        require_disk(needed + 50_000_000, path.parent, "this plan's checkpoint")
        made = self._applied(plan)
        build.require_size(made, setting.max_bytes if limited else None)
        building = path.with_name(f"{BUILDING}{os.getpid()}")
        scratch = building / path.name
        try:
            weights_sha256 = made.write(scratch)
            described = {**compress.description(plan, setting), "weights_sha256": weights_sha256}
            write_json(scratch / compress.DESCRIPTION, described)
            if not path.exists():  # else another worker has built the same meanwhile
                scratch.replace(path)
        except OSError as error:
            raise CompressionError(f"build: {path}: {error.strerror or error}; nothing was left there") from None
        finally:
            shutil.rmtree(building, ignore_errors=True)
            release(setting.device)
        return path, weights_sha256

    def measure(
        self, path: Path, weights_sha256: str, then: Callable[[EngineProcess], None] = lambda _: None
    ) -> Measurement:
        """The checkpoint in `path`. then: called with the candidate's engine before it is closed."""
        setting = self.setting
        measured = setting.file.evaluation.speed == "measured"
        baseline = self.baseline_engine() if measured else None
        self.say("starting the engine")
        with self._start(path, "candidate") as engine:
            found = measure.measure(
                path,
                engine,
                baseline,
                setting.shards,
                setting.workload,
                weights_sha256=weights_sha256,
                time_it=measured,
                expected_base_ms=self.baseline().time_per_token_ms,
                progress=self.say,
                tasks=setting.tasks,
            )
            then(engine)
        if not measured:
            found = with_predicted_time(found, self._ratio_by_size(path))  # what is there, not what was foreseen
        return found

    def _ratio_by_size(self, path: Path) -> float:
        """Of a checkpoint of any origin, from what a decode step reads, as a plan's is predicted."""
        found, base, own = structure.describe_any(path), self.setting.base, self.setting.identity
        read = found.decode_bytes
        return speed.predicted_time_ratio(
            candidate_bytes=self._served(found.bytes if read is None else read, found.dtype),
            base_bytes=self._served(base.size_bytes if read is None else base.decode_bytes, own.precision),
            layers=len(found.layers),
            base_layers=own.num_hidden_layers,
        )

    def _served(self, stored: int, dtype: str) -> int:
        """Bytes that the engine reads of these: vLLM casts a float32 checkpoint to 16 bits when it loads it."""
        return stored // 2 if dtype == "float32" and self.setting.backend == "vllm" else stored


def with_predicted_time(measurement: Measurement, ratio: float) -> Measurement:
    """For `evaluation.speed=predicted`: the ratio to the baseline comes from weight bytes, not from a clock."""
    timing = Timing(
        time_per_token_ms=ratio,
        time_per_token_ms_se=0.0,
        base_time_per_token_ms=1.0,
        base_time_per_token_ms_se=0.0,
        time_ratio=ratio,
        time_ratio_se=0.0,
        samples=0,
    )
    return measure.with_timing(measurement, timing)


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
        trial.set_user_attr("worker", study.identify_worker())
        try:
            with self.interruptible():
                return self._run(trial, record)
        except optuna.TrialPruned:
            raise
        except KeyboardInterrupt:
            record.failure, record.reason = study.INTERRUPTED, "stopped by the user; it will be tried again"
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
        running_mean = study.wants_running_mean(setting.file.pruner)
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
                record.screen = _screen_of(found)
                record.reason = (
                    f"screen: {sum(values) / len(values):.3f} on {len(values)} of {len(setting.shards)} shards"
                    f"{self._best_there(trial, len(values))}: {setting.file.pruner.name} gives it up"
                )
                raise optuna.TrialPruned(record.reason)
        screen = _screen_of(found)
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
        mean = there[-1] if study.wants_running_mean(self.setting.file.pruner) else sum(there) / len(there)
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
            "perplexity": measured.perplexity,
            "kl_nats_per_token": measured.kl_nats_per_token,
            "top1_agreement": measured.top1_agreement,
            "time_per_token_ms": measured.time_per_token_ms,
            "tokens_per_sec": measured.tokens_per_sec,
            "model_size_mb": measured.model_size_mb,
            "total_parameters": measured.total_parameters,
        }
    return {name: value for name, value in found.items() if value is not None}


def read_screen(path: Path) -> Screen | None:
    saved = read_json(path)
    return None if saved is None else Screen(**{name: tuple(values) for name, values in saved.items()})


def _screen_of(found: list[quality.ShardQuality]) -> Screen:
    return Screen(
        nll=tuple(shard.nll for shard in found),
        kl=tuple(shard.kl for shard in found),
        agreement=tuple(shard.agreement for shard in found),
    )


def mean_known(values: tuple[float | None, ...]) -> float | None:
    """Over the shards that the reference covers."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _key(circumstances: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()[:16]
