"""What every trial of a study shares: the base model, its texts, the machine, the parts of Perf.

It is prepared once, and checked before anything is written. Knows no Optuna.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from compressors import build
from compressors.build import Kernels
from compressors.choices import DTYPES
from compressors.distillation import repair as distillation
from compressors.errors import CheckpointError, CompressionError
from compressors.model import checkpoint, family
from compressors.model.transformers_version import config_for, in_old_form
from compressors.plan import DIMENSIONS, CompressionPlan
from compressors.statistics import second_moments
from evaluator import backends, batch, checkpoint_files, gpus, lengths, speed, tasks, texts
from evaluator.backends import EngineSettings
from evaluator.errors import TextError
from evaluator.measurement import Measurement
from evaluator.score import Formula
from evaluator.workload import Workload
from search.config.space_section import Range, Space
from search.config.study_file import StudyFile
from search.config.text_section import SELF
from search.errors import UsageError
from search.files import CACHE
from search.say import Say, silent
from search.setup import sources
from search.setup.engine_memory import tokens_that_fit
from search.setup.goal import Goal
from search.setup.machine import (
    Machine,
    choose_engine,
    compute_capability,
    device_name,
    engine_version,
    require_memory,
    total_memory,
)
from search.setup.own_text import OwnText, Writer
from search.setup.requests import Prompts, read_prompts, require_room
from search.setup.server import require_server, require_serving
from search.setup.texts import (
    DistillationText,
    Domains,
    MomentsText,
    StudyTexts,
    calibration_weights,
    read_texts,
    tokenizer_of,
)

WRITTEN_TOGETHER = 64  # answers of tasks that an engine writes at once


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The model that is compressed.

    Attributes:
        path: Its directory.
        checkpoint: Its config and tensors.
        digest: sha256 of config and tensors, 32 hexadecimal digits.
        family: Where it keeps its parts.
        identity: The plan that changes nothing of it.
    """

    path: Path
    checkpoint: checkpoint.Checkpoint
    digest: str
    family: family.Family
    identity: CompressionPlan


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every trial of a study shares; `search.setup.keys` names it in caches and storages."""

    file: StudyFile
    model: BaseModel
    texts: StudyTexts
    machine: Machine
    tasks: tuple[tasks.Task, ...] = ()  # the parts of Perf other than perplexity
    prompts: Prompts = ()  # of a workload of kind batch or serve that reads a file
    _reasons: dict[CompressionPlan, str | None] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # what `infeasible` has found: a sampler asks for thousands of plans, again and again
    _sizes: dict[CompressionPlan, float] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _bytes: dict[CompressionPlan, tuple[int, int]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def outputs(self) -> Path:
        """The directory of checkpoints, measurements and caches."""
        return self.file.outputs

    @property
    def sources(self) -> list[Path]:
        """The base model's directory, and the one that the study file names, from which it may have been converted."""
        named = sources.named(self.file.model.source)
        return [self.model.path, *([named] if named.is_dir() else [])]

    @property
    def wants_time(self) -> bool:
        """Whether plans are timed, and their times decide anything."""
        return self.file.evaluation.is_timed and self.goal.wants_time(self.formula.weight_speed)

    @functools.cached_property
    def workload(self) -> Workload:
        """What is timed."""
        workload = Workload.from_dict(self.file.evaluation.workload.of_kind)
        if workload.kind == "decode":
            return workload
        if workload.kind == "serve" and not self.prompts:
            return workload  # vLLM's client draws random ids itself
        workload = batch.with_requests(workload, int(self.model.checkpoint.config["vocab_size"]), self.prompts)
        if workload.kind == "serve":
            tokenizer = self.texts.moments.tokenizer
            texts = [tokenizer.decode(list(one), clean_up_tokenization_spaces=False) for one in self.prompts]
            return dataclasses.replace(workload, texts=tuple(texts))
        return workload

    @property
    def formula(self) -> Formula:
        """How measurements are scored."""
        score, named = self.file.score, iter(self.tasks)
        parts = [
            ("perplexity" if part.metric == "perplexity" else next(named).name, part.weight)
            for part in self.file.evaluation.perf
        ]
        return Formula(**score.weights, perf=tuple(parts), penalise_length=score.length == "penalise")

    def length_warning(self, measured: Measurement, baseline: Measurement) -> str | None:
        """Say in a line whose answers are too long or too short next to the base model's; None where none are."""
        if self.file.score.length == "ignore":
            return None
        return lengths.warning(measured, baseline, self.file.evaluation.length_tolerance)

    @property
    def goal(self) -> Goal:
        """What the study searches for."""
        return Goal.of(self.file.goal)

    @property
    def enough(self) -> speed.Enough:
        """When a timing may end before it has taken all of its turns."""
        wanted, weight = self.file.evaluation.score_se, self.file.score.weight_speed
        return speed.Enough(wanted / weight) if wanted and weight else speed.ALL_TURNS

    @property
    def max_bytes(self) -> int | None:
        """The largest model.safetensors, or None."""
        limit = self.file.limits.max_size_mb
        return None if limit is None else int(limit * 1e6)

    @property
    def kernels(self) -> Kernels | None:
        """What the engine's fast kernels ask of sizes; None where any size runs."""
        return backends.kernels(self.machine.backend, self.machine.device)

    @property
    def engine_settings(self) -> EngineSettings:
        """How engines are run."""
        evaluation, workload = self.file.evaluation, self.workload
        if workload.kind == "batch":
            timed, together, kv_tokens = batch.longest(workload), workload.sizes[0], batch.kv_tokens(workload)
        else:
            step = backends.batched_tokens(self.machine.backend) or 2048
            prefills = math.ceil(max(workload.batch_sizes) * workload.prompt_tokens / step)
            timed, together, kv_tokens = workload.prompt_tokens + workload.decode_steps + prefills + 16, None, None
            if any(task.writes for task in self.tasks):
                together = max(WRITTEN_TOGETHER, *workload.batch_sizes)
        longest = max(self.file.text.window + 8, timed, *(task.longest + 8 for task in self.tasks))
        if together is not None:
            kv_tokens = self._that_fit(kv_tokens or together * longest, longest)
        return EngineSettings(
            device=self.machine.device,
            max_model_len=longest,
            batch_sizes=workload.batch_sizes,
            gpu_memory_utilization=evaluation.gpu_memory_utilization,
            compile=evaluation.compile,
            threads=self.machine.threads,
            start_timeout_s=evaluation.start_timeout_s,
            call_timeout_s=evaluation.call_timeout_s,
            max_num_seqs=together,
            kv_tokens=kv_tokens,
        )

    def _that_fit(self, tokens: int, longest: int) -> int:
        """Return how many of these tokens' keys and values each of the two engines has room for."""
        base = self.model.checkpoint
        return tokens_that_fit(tokens, longest, base.size_bytes, backends.kv_bytes(base.config), self.machine.memory)

    @property
    def room_warning(self) -> str | None:
        """Say that fewer requests are generated at once than the workload names; None where all have room."""
        workload, held = self.workload, self.engine_settings.kv_tokens
        wanted = batch.kv_tokens(workload) if workload.kind == "batch" else 0
        if held is None or held >= wanted:
            return None
        return (
            f"evaluation.workload: its requests hold the keys and values of {wanted:,} tokens at once, and each of the "
            f"two engines on this GPU has room for {held:,}: fewer are generated at once than by a server that has the "
            "whole GPU. Lower max_num_seqs, or the lengths, if that is not to be"
        )

    def size_ratio(self, plan: CompressionPlan) -> float:
        """Return the size of a plan's weight file over the base model's, from shapes; inf if it can't be built.

        It is exact but for plans with `keep_16_bit`, which turn out larger.
        """
        if plan == self.model.identity:
            return 1.0
        if plan not in self._sizes:
            model = self.model
            try:
                self._sizes[plan] = self.bytes_of(plan)[0] / checkpoint_files.describe(model.path).bytes
            except CompressionError:  # also a config that transformers refuses
                self._sizes[plan] = math.inf
        return self._sizes[plan]

    def bytes_of(self, plan: CompressionPlan) -> tuple[int, int]:
        """Return the bytes of a plan's weight file, and those that a decode step reads, from shapes.

        Raises:
            InfeasiblePlan: The plan can't be built from this model.
        """
        if plan not in self._bytes:
            shapes = build.shapes(plan, self.model.checkpoint, self.model.family)
            self._bytes[plan] = shapes.file_bytes, shapes.decode_bytes
        return self._bytes[plan]

    def infeasible(self, plan: CompressionPlan) -> str | None:
        """Say why the plan can't be built, served or exported here; None where it can."""
        if plan not in self._reasons:
            self._reasons[plan] = self._why_infeasible(plan)
        return self._reasons[plan]

    def _why_infeasible(self, plan: CompressionPlan) -> str | None:
        model, machine = self.model, self.machine
        reason = (
            backends.cannot_start(machine.backend, plan.precision, machine.capability)
            or self._refused_by_target(plan.precision)
            or build.check(plan, model.checkpoint, model.family, kernels=self.kernels, max_bytes=self.max_bytes)
        )
        version = self.file.export.for_transformers
        if reason is None and version is not None:
            try:
                config_for(build.shapes(plan, model.checkpoint, model.family).config, version)
            except CheckpointError as error:  # what is built could not be exported
                return str(error)
        return reason

    def _refused_by_target(self, precision: str) -> str | None:
        """Say why the GPU that will serve the model can't run a precision in vLLM; None where it can."""
        target = self.file.export.target_gpu
        return None if target is None else backends.cannot_start("vllm", precision, gpus.CAPABILITIES[target], target)


def prepare(
    file: StudyFile, say: Say = silent, *, search: bool = True, engine: bool = True, warn: Say = silent
) -> Setting:
    """Prepare and check everything; nothing is written but caches.

    Args:
        file: The study file.
        say: Told what is done.
        search: False by hand, where the space is not used and need not fit the model.
        engine: False where nothing is to be served or scored, so that the engine need not be able to run here.
        warn: Told what people should know of their input.

    Raises:
        UsageError: The study file does not fit the model or the machine.
        CheckpointError: The model can't be read.
        EvaluationError: The engine can't run, or a text can't be read.
    """
    backend, device = choose_engine(file, engine)
    say(f"model {file.source_shown}")
    path = sources.resolve(file.model.source, CACHE, revision=file.model.revision, say=say)
    base = checkpoint.Checkpoint.read(path)
    its_family = family.family_of(base)
    identity = CompressionPlan.identity(base.config)
    misfit = out_of_range(file.space, identity)
    if search and misfit:
        raise UsageError(misfit)
    if file.export.for_transformers is not None:  # or nothing could be written after all that work
        in_old_form(file.export.for_transformers)
        if search:
            config_for(base.config, file.export.for_transformers)
    if identity.precision not in DTYPES:
        raise UsageError(
            f"model {path}: its dtype is {identity.precision}; optuna-search starts from {', '.join(DTYPES)}"
        )
    wide = device == "cpu" or identity.precision == "float32"
    require_memory(base.total_parameters * (4 if wide else 2), device, "the base model")
    with ThreadPoolExecutor(1) as hashing:  # which takes seconds, as reading the texts does
        digest = hashing.submit(checkpoint.digest_of, path, CACHE / "digests")
        tokenizer = tokenizer_of(path)

        def write(tokens: int, part: int) -> Domains:
            directory, engine = file.outputs / "calibration", _writing(file, device)
            writer = Writer(path, digest.result(), tokenizer, directory, _writers(backend), engine, say)
            return writer.domains(tokens, part)

        its_texts = _texts(file, tokenizer, write, device, warn)
    setting = Setting(
        file=file,
        model=BaseModel(path, base, digest.result(), its_family, identity),
        texts=its_texts,
        machine=Machine(
            backend,
            device,
            device_name(device),
            engine_version(backend),
            capability=compute_capability(device),
            memory=total_memory(device) if device == "cuda" else None,
        ),
        tasks=_tasks(file, tokenizer, base.config) if engine else (),
        prompts=read_prompts(file, tokenizer) if engine else (),
    )
    if engine and setting.workload.kind == "serve":
        require_serving(file, backend, setting.workload)
    if engine and setting.workload.kind != "decode":
        require_room(setting.workload, base.config.get("max_position_embeddings"))
        if (little := setting.room_warning) is not None:
            warn(little)
    if search and engine:
        require_server(file, backend, setting.engine_settings.max_model_len)
    return setting


def _texts(file: StudyFile, tokenizer: Any, write: Callable[[int, int], Domains], device: str, warn: Say) -> StudyTexts:
    """Read the study's texts; `write` has the base model write text, see `Writer.domains`."""
    length, count = file.text.window, file.text.moments_windows
    of_each = count or second_moments.windows_on(device, length)
    own = OwnText(write, tokenizer, length, max(of_each, file.text.calibration_windows))
    domains, shards, windows = read_texts(file, tokenizer, own.fitted, warn)
    weigh = functools.partial(calibration_weights, file)
    alone = set(file.text.calibration_names) == {SELF}
    writes: Callable[[int], Domains] = own.at_least if alone else lambda windows: {}
    if file.text.writes_beside:
        writes = functools.partial(_or_none, own.at_least, warn)
    beside = functools.partial(writes, 0) if file.text.writes_beside else dict
    return StudyTexts(
        shards=shards,
        calibration_windows=windows,
        moments=MomentsText(domains, tokenizer, length, of_each, beside, weigh, or_fewer=count is None, warn=warn),
        distillation=DistillationText(
            {} if alone else domains, writes, tokenizer, length, distillation.tokens_on(device), weigh
        ),
        digest=texts.text_digest([window for shard in shards for window in shard]),
        unseen=own.unseen if SELF in file.text.calibration_names else tuple,
    )


def _or_none(own: Callable[[int], Domains], warn: Say, windows: int) -> Domains:
    """Return what the base model writes beside other text; nothing, with a warning, where it writes too little."""
    try:
        return own(windows)
    except TextError as error:
        warn(f"{error}; the other texts are used alone")
        return {}


def _writers(backend: str) -> tuple[str, ...]:
    """Return the engines that may write text, the fastest first: on two cores vLLM writes five times as fast."""
    return (backend,) if backends.unavailable("vllm") else tuple(dict.fromkeys(["vllm", backend]))


def _writing(file: StudyFile, device: str) -> EngineSettings:
    """Return how the engine is run that the base model writes text with."""
    evaluation = file.evaluation
    return EngineSettings(
        device=device,
        gpu_memory_utilization=evaluation.gpu_memory_utilization,
        start_timeout_s=evaluation.start_timeout_s,
    )


def _tasks(file: StudyFile, tokenizer: Any, config: Mapping[str, Any]) -> tuple[tasks.Task, ...]:
    sections = [(part.metric, part.task_section()) for part in file.evaluation.perf]
    found = [tasks.load(kind, section, tokenizer) for kind, section in sections if section is not None]
    names = [task.name for task in found]
    if len({*names, "perplexity"}) <= len(names):
        raise UsageError(f"evaluation.perf: two parts are called {', '.join(names)}; give each a name of its own")
    most = config.get("max_position_embeddings")
    for task in found:
        if task.writes and isinstance(most, int) and task.longest > most:
            raise UsageError(
                f"evaluation.perf: task {task.name}: a prompt and its answer have up to {task.longest} tokens, and the "
                f"model reads at most {most} (max_position_embeddings); lower max_tokens, or shorten the prompts"
            )
    return tuple(found)


def out_of_range(space: Space, base: CompressionPlan) -> str | None:
    """Say why the space does not fit the base model, since nothing can grow; None where it fits."""
    for name in DIMENSIONS:
        wanted, own = getattr(space, name), getattr(base, name)
        high = wanted.high if isinstance(wanted, Range) else wanted
        if high is not None and high > own:
            return f"space.{name}: {high} exceeds the base model's {own}; compression can only make it smaller"
    return None
