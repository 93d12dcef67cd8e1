"""What every trial of a study shares: the base model, its calibration, the text, the engine, the places on disk.

Prepared once, checked before anything is written; knows no Optuna.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressors import build
from compressors.build import Kernels
from compressors.choices import DTYPES
from compressors.errors import CheckpointError
from compressors.files import write_json as write_json
from compressors.model import checkpoint
from compressors.model import family as families
from compressors.model.transformers_version import config_for
from compressors.plan import CHOICES, DIMENSIONS, OPTIONS, CompressionPlan
from compressors.plan import VERSION as PLAN_VERSION
from compressors.statistics import activations, second_moments
from evaluator import tasks, texts
from evaluator.backends import EngineSettings, kernels
from evaluator.measurement import METHOD, Workload
from evaluator.score import Formula
from search.config.study_file import Range, Space, StudyFile
from search.errors import UsageError
from search.files import CACHE
from search.setup import sources
from search.setup.machine import choose_engine, device_name, engine_version, require_disk, require_memory
from search.setup.texts import (
    MomentsText,
    Shard,
    calibration_documents,
    embedded_report,
    read_files,
    read_texts,
    require_apart,
    search_documents,
    shards_of,
    tokenizer_of,
)

Say = Callable[[str], None]  # told what is being done, for people


@dataclasses.dataclass(frozen=True)
class Setting:
    file: StudyFile
    base_path: Path
    base: checkpoint.Checkpoint
    base_digest: str
    family: families.Family
    identity: CompressionPlan
    shards: tuple[Shard, ...]
    calibration_windows: tuple[list[int], ...]
    moments_text: MomentsText
    text_digest: str
    backend: str
    device: str  # cpu | cuda | mps
    device_name: str
    engine_version: str
    tasks: tuple[tasks.Task, ...] = ()  # the parts of Perf that are no perplexity
    threads: int | None = None  # of each engine on a CPU, where several workers share it

    @property
    def outputs(self) -> Path:
        return self.file.outputs

    @property
    def workload(self) -> Workload:
        section = self.file.evaluation.workload
        return Workload(
            batch_sizes=tuple(section.batch_sizes),
            prompt_tokens=section.prompt_tokens,
            decode_steps=section.decode_steps,
            turns=section.turns,
            seed=section.seed,
        )

    @property
    def formula(self) -> Formula:
        score, named = self.file.score, iter(self.tasks)
        parts = [
            ("perplexity" if part.metric == "perplexity" else next(named).name, part.weight)
            for part in self.file.evaluation.perf
        ]
        return Formula(weight_perf=score.weight_perf, weight_speed=score.weight_speed, perf=tuple(parts))

    @property
    def max_bytes(self) -> int | None:
        limit = self.file.limits.max_size_mb
        return None if limit is None else int(limit * 1e6)

    @property
    def kernels(self) -> Kernels | None:
        """What the engine's fast kernels ask of sizes; None where any size runs."""
        return kernels(self.backend, self.device)

    @property
    def engine_settings(self) -> EngineSettings:
        evaluation, workload = self.file.evaluation, self.workload
        prefills = math.ceil(
            max(workload.batch_sizes) * workload.prompt_tokens / 2048
        )  # vLLM's largest batch of tokens
        steps = workload.prompt_tokens + workload.decode_steps + prefills + 16
        return EngineSettings(
            device=self.device,
            max_model_len=max(self.file.text.window + 8, steps, *(task.longest + 8 for task in self.tasks)),
            batch_sizes=workload.batch_sizes,
            gpu_memory_utilization=evaluation.gpu_memory_utilization,
            compile=evaluation.compile,
            threads=self.threads,
            start_timeout_s=evaluation.start_timeout_s,
            call_timeout_s=evaluation.call_timeout_s,
        )

    @property
    def circumstances(self) -> dict[str, Any]:
        """What a measurement depends on beside the model: the key of every cached number."""
        asked = {"tasks": {task.name: task.digest for task in self.tasks}} if self.tasks else {}
        return {
            **asked,
            "method": METHOD,
            "threads": self.threads,
            "text": self.text_digest,
            "workload": dataclasses.asdict(self.workload),
            "speed": self.file.evaluation.speed,
            "backend": self.backend,
            "compile": self.file.evaluation.compile,
            "engine_version": self.engine_version,
            "device": self.device_name,
        }

    @property
    def definition(self) -> dict[str, Any]:
        """What must not change under a study's name. Ranges of integers may; categorical choices may not."""
        searched = {}
        for name, value in self.file.space.model_dump().items():
            if name in OPTIONS and value in (OPTIONS[name], [OPTIONS[name]]):
                continue  # an option that is not searched says nothing, and studies may be older than it
            searched[name] = "searched" if isinstance(value, dict) else value
        circumstances = json.loads(json.dumps(self.circumstances))
        del circumstances["engine_version"]  # a newer engine measures its own baseline
        fitted = {"moments_windows": self.file.text.moments_windows} if self._may_need_moments else {}
        return {
            **fitted,
            "model": {"source": self.file.model.source, "digest": self.base_digest},
            "space": searched,
            "calibration": self._calibration_key,
            "max_size_mb": self.file.limits.max_size_mb,
            "score": self._score_definition,
            "evaluation": circumstances,
            "pruner": self.file.pruner.name,  # decides what is reported: raw shards, or running means
        }

    @property
    def _may_need_moments(self) -> bool:
        """Whether any plan of the space rests on second moments."""
        for name in CHOICES:
            searched = getattr(self.file.space, name)
            values = searched if isinstance(searched, list) else [getattr(searched, "high", searched)]
            if any(build.needs_moments(dataclasses.replace(self.identity, **{name: value})) for value in values):
                return True
        return False

    @property
    def _score_definition(self) -> dict[str, Any]:
        parts = {"perf": dict(self.formula.perf)} if self.tasks else {}
        return {**self.file.score.model_dump(), **parts}

    def plan_digest(self, plan: CompressionPlan) -> str:
        fitted = [self.moments_text.digest, *build.versions(plan)] if build.needs_moments(plan) else []
        return plan.digest(" ".join([self.base_digest, self._calibration_key, *fitted]))

    def description(self, plan: CompressionPlan, target: str | None = None) -> dict[str, Any]:
        """What compression.json says of a checkpoint, but for its weights' digest."""
        return {
            "plan": plan.to_dict(),
            "plan_digest": self.plan_digest(plan),
            "base": {"source": self.file.model.source, "digest": self.base_digest},
            "for_transformers": target,
        }

    def key(self, plan: CompressionPlan) -> str:
        """Names a plan's measurement under these circumstances."""
        text = json.dumps([self.plan_digest(plan), self.circumstances], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def infeasible(self, plan: CompressionPlan) -> str | None:
        reason = build.check(plan, self.base, self.family, kernels=self.kernels, max_bytes=self.max_bytes)
        version = self.file.export.for_transformers
        if reason is None and version is not None:
            try:
                config_for(build.shapes(plan, self.base, self.family).config, version)
            except CheckpointError as error:  # what is built could not be exported
                return str(error)
        return reason

    @property
    def _calibration_key(self) -> str:
        exact = "float32" if self.device == "cpu" else self.identity.precision
        text = json.dumps(
            [PLAN_VERSION, exact, self.base_digest, [list(window) for window in self.calibration_windows]]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def calibration_path(self) -> Path:
        return self.outputs / "calibration" / f"{self._calibration_key}.safetensors"

    def calibrate(self, say: Say = lambda _: None) -> activations.Calibration:
        """The base model's activation statistics, collected once and kept."""
        path = self.calibration_path
        if path.is_file():
            return activations.Calibration.load(path)
        say("calibrating")
        collected = activations.calibrate(
            self.base,
            self.calibration_windows,
            self.device,
            progress=lambda done, total: say(f"calibrating, window {done} of {total}"),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        collected.save(path)
        return collected

    def moments_for(self, plan: CompressionPlan, say: Say = lambda _: None) -> second_moments.Moments | None:
        """The second moments that this plan asks for, collected once and kept; None when it asks for none."""
        if not build.needs_moments(plan):
            return None
        windows = self.moments_text.windows
        exact = "float32" if self.device == "cpu" else self.identity.precision
        key = hashlib.sha256(
            json.dumps([PLAN_VERSION, "with windows", exact, self.base_digest, windows]).encode()
        ).hexdigest()[:24]
        path = self.outputs / "calibration" / f"moments-{key}"
        if not path.is_dir():
            require_disk(second_moments.file_bytes(self.base, len(windows)) + 50_000_000, path.parent, "second moments")
        return second_moments.collect(
            self.base,
            windows,
            path,
            self.device,
            progress=lambda done, total: say(f"second moments, layer {done} of {total}"),
        )


def prepare(file: StudyFile, say: Say = lambda _: None, *, search: bool = True, engine: bool = True) -> Setting:
    """Everything checked, nothing written but the embedded model's cache.

    search: False by hand, where the space says nothing and need not fit the model.
    engine: False where nothing is to be served or scored: then it need not be able to run here.
    Raises UsageError, CheckpointError, EvaluationError (a backend or a text): one line each.
    """
    backend, device = choose_engine(file, engine)
    say(f"model {file.model.source}")
    path = sources.resolve(file.model.source, CACHE, revision=file.model.revision, say=say)
    base = checkpoint.Checkpoint.read(path)
    its_family = families.family_of(base)
    identity = CompressionPlan.identity(base.config)
    misfit = out_of_range(file.space, identity)
    if search and misfit:
        raise UsageError(misfit)
    if search and file.export.for_transformers is not None:
        config_for(base.config, file.export.for_transformers)  # or no trial could be exported
    if identity.precision not in DTYPES:
        raise UsageError(
            f"model {path}: its dtype is {identity.precision}; optuna-search starts from {', '.join(DTYPES)}"
        )
    wide = device == "cpu" or identity.precision == "float32"
    require_memory(base.total_parameters * (4 if wide else 2), device, "the base model")
    tokenizer = tokenizer_of(path)
    domains, shards, windows = read_texts(file, tokenizer)
    digest = checkpoint.digest_of(path, CACHE / "digests")
    return Setting(
        file=file,
        base_path=path,
        base=base,
        base_digest=digest,
        family=its_family,
        identity=identity,
        shards=shards,
        calibration_windows=windows,
        moments_text=MomentsText(domains, tokenizer, file.text.window, file.text.moments_windows),
        text_digest=texts.text_digest([window for shard in shards for window in shard]),
        backend=backend,
        device=device,
        device_name=device_name(device),
        engine_version=engine_version(backend),
        tasks=_tasks(file, tokenizer) if engine else (),
    )


def out_of_range(space: Space, base: CompressionPlan) -> str | None:
    """Why the space does not fit the base model, or None: nothing can grow."""
    for name in DIMENSIONS:
        wanted, own = getattr(space, name), getattr(base, name)
        high = wanted.high if isinstance(wanted, Range) else wanted
        if high is not None and high > own:
            return f"space.{name}: {high} exceeds the base model's {own}; compression can only make it smaller"
    return None


def _tasks(file: StudyFile, tokenizer: Any) -> tuple[tasks.Task, ...]:
    sections = [(part.metric, part.task_section()) for part in file.evaluation.perf]
    found = [tasks.load(kind, section, tokenizer) for kind, section in sections if section is not None]
    names = [task.name for task in found]
    if len({*names, "perplexity"}) <= len(names):
        raise UsageError(f"evaluation.perf: two parts are called {', '.join(names)}; give each a name of its own")
    return tuple(found)


def report_shards(setting: Setting) -> tuple[Shard, ...]:
    """Text that neither the calibration nor the search saw, cut as the search text is; () where there is to be none.

    Raises UsageError when it shares text with one of them, TextError when it can't be read.
    """
    file = setting.file
    if file.text.report is None:
        return ()
    documents = embedded_report() if isinstance(file.text.report, str) else read_files(file.text.report)
    require_apart(file, {"calibration": calibration_documents(file), "report": documents})
    require_apart(file, {"search": search_documents(file), "report": documents})
    return shards_of(file, tokenizer_of(setting.base_path), documents)
