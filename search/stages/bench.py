"""A worker's engines and the base model's screen, kept warm from trial to trial."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compressors import build
from compressors.device import compute_dtype, release
from compressors.errors import CompressionError
from compressors.files import write_json
from compressors.model import checkpoint, structure
from compressors.plan import DESCRIPTION, CompressionPlan
from compressors.statistics import activations
from evaluator import measure, quality, score, speed
from evaluator.errors import NotFinite
from evaluator.measurement import Measurement, Timing
from evaluator.process import EngineProcess
from search.errors import UsageError
from search.files import read_json
from search.setup.machine import require_disk, require_memory
from search.setup.setting import Setting
from search.stages.screen import Screen, read_screen, screen_of_shards

BASELINE_RESULT = "baseline_result.json"
BUILDING = ".building-"  # + the worker's pid: where a checkpoint is until it is whole


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
        self._calibration: activations.Calibration | None = None

    def close(self) -> None:
        if self._baseline_engine is not None:
            self._baseline_engine.close()
            self._baseline_engine = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- the base model --------------------------------------------------------------------------------------

    def calibration(self) -> activations.Calibration:
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
            timed = setting.file.evaluation.speed == "measured"
            measurement = measure.measure_base(
                setting.base_path,
                engine,
                measure.Request(setting.shards, setting.workload, setting.tasks, timed=timed),
                progress=lambda what: self.say(f"baseline: {what}"),
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
            known = screen_of_shards(list(self.shards(plan, None)))
            write_json(path, dataclasses.asdict(known))
        return known

    def screen_of(self, model: Any) -> Screen:
        """The same of a model in memory, on the setting's device, that no plan made."""
        reference = self._in_memory_reference()
        shards = enumerate(self.setting.shards)
        return screen_of_shards([quality.shard_quality(model, shard, reference, index) for index, shard in shards])

    @contextlib.contextmanager
    def _model(self, plan: CompressionPlan) -> Iterator[Any]:
        setting = self.setting
        simulated = self._applied(plan, simulate=True)
        on_cpu = setting.device == "cpu"
        need = simulated.total_parameters * 4 if on_cpu else simulated.size_bytes
        if plan.repair == "stream":  # beside it, for a while, the base model and the cut one
            need = 2 * need + (setting.base.total_parameters * 4 if on_cpu else setting.base.size_bytes)
        require_memory(need, setting.device, "screening this plan")
        model = simulated.to_model(setting.device, dtype=compute_dtype(setting.device))
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
        simulated = build.shapes(plan, setting.base, setting.family)
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
        known = read_json(path / DESCRIPTION)
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
            described = {**setting.description(plan), "weights_sha256": weights_sha256}
            write_json(scratch / DESCRIPTION, described)
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
            found = measure.measure_candidate(
                path,
                engine,
                measure.Request(setting.shards, setting.workload, setting.tasks, timed=measured),
                baseline,
                weights_sha256=weights_sha256,
                expected_base_ms=self.baseline().time_per_token_ms,
                progress=self.say,
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


def _key(circumstances: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()[:16]
