"""Functions that measure one checkpoint with one engine.

Timing comes first, while nothing else runs, then quality, then the tasks, then the digests. `measure_base` measures the
base model, `measure_candidate` a compressed one next to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluator import checkpoint_files, lengths, quality, serve_bench, speed, texts
from evaluator.errors import EvaluationError, NotFinite
from evaluator.gpu_state import GpuRecord
from evaluator.gpu_watch import GpuWatch
from evaluator.measurement import Measurement, Timing
from evaluator.process import EngineProcess
from evaluator.score import PERPLEXITY, standard_error
from evaluator.task_result import TaskResult
from evaluator.tasks import Task
from evaluator.workload import Workload

UNTIMED = Timing(1.0, 0.0, 1.0, 0.0, 1.0, 0.0, samples=0)
UNTIMED_NOTE = "nothing was timed: time_per_token_ms and tokens_per_sec are relative to the baseline's 1"
NOTED = ("quantization_kernel", "threads")  # facts of an engine that become notes of a measurement

Shards = Sequence[Sequence[Sequence[int]]]  # shards of windows of token ids
Pair = tuple[speed.Timed | speed.TimedServer, speed.Timed | speed.TimedServer]  # the candidate and the baseline
Progress = Callable[[str], None] | None  # told what is being done


@dataclasses.dataclass(frozen=True)
class Request:
    """What is measured: the same for the base model and for every candidate.

    Attributes:
        shards: Shards of windows of token ids, all of which are used.
        workload: The workload that is timed.
        tasks: The tasks that are asked after the perplexity.
        timed: Whether the workload is timed. If not, every time is relative to the baseline's 1.

    Raises:
        EvaluationError: Two tasks have one name, or a task is called perplexity.
    """

    shards: Shards
    workload: Workload
    tasks: Sequence[Task] = ()
    timed: bool = True

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if len({*names, PERPLEXITY}) <= len(names):
            raise EvaluationError(
                f"tasks: {', '.join(names)}: each needs a name of its own, and {PERPLEXITY} is the text's; rename one"
            )


@dataclasses.dataclass(frozen=True)
class Partial:
    """What is known of a model when the first answers to a task are there.

    Attributes:
        loss: Its loss on the text.
        timing: Its timing; `UNTIMED` where nothing is timed.
        tasks: The results of the tasks that were asked before.
        task: The name of the task.
        correct: How correct the first answers are.
    """

    loss: Loss
    timing: Timing
    tasks: Mapping[str, TaskResult]
    task: str
    correct: tuple[float, ...] = ()


FirstAnswers = Callable[[Partial], None] | None


def measure_base(
    path: str | Path,
    engine: EngineProcess,
    request: Request,
    *,
    progress: Progress = None,
    enough: speed.Enough = speed.ALL_TURNS,
    server: serve_bench.Timed | None = None,
) -> Measurement:
    """Measure the base model, whose time ratio is 1; its standard error is that of timing one engine against itself.

    Args:
        path: The checkpoint directory.
        engine: The engine that has loaded it.
        request: What is measured.
        progress: A function that is told what is being done.
        enough: When fewer turns of the timing are enough.
        server: The server that is timed in the engine's place, for a workload of kind serve.

    Raises:
        NotFinite: The model is broken.
        EvaluationError: The engine raised it.
    """
    seconds = dict(engine.seconds)
    if not request.timed:
        measurement = _measure(path, engine, request, UNTIMED, seconds, None, progress)
        return lengths.with_ratio(measurement, measurement)
    pair: Pair = (engine, engine) if server is None else (server, server)
    timing, gpu = _time(engine.facts(), pair, request, seconds, progress, enough=enough)
    measurement = _watched(_measure(path, engine, request, _as_base(timing), seconds, None, progress), gpu)
    measurement = _with_served(lengths.with_ratio(measurement, measurement), server)
    itself = f"timed against itself: time ratio {timing.time_ratio:.4f} ± {timing.time_ratio_se:.4f}"
    return dataclasses.replace(measurement, notes=(*measurement.notes, itself))


def measure_candidate(
    path: str | Path,
    engine: EngineProcess,
    request: Request,
    baseline: EngineProcess | None,
    *,
    weights_sha256: str | None = None,
    expected_base_ms: float | None = None,
    progress: Progress = None,
    enough: speed.Enough = speed.ALL_TURNS,
    first_answers: FirstAnswers = None,
    servers: tuple[serve_bench.Timed, serve_bench.Timed] | None = None,
) -> Measurement:
    """Measure a candidate, timed in turn with the base model.

    Args:
        path: The checkpoint directory.
        engine: The engine that has loaded it.
        request: What is measured.
        baseline: The base model's engine; None is allowed only where it is not timed.
        weights_sha256: The sha256 of model.safetensors, if it is known.
        expected_base_ms: The baseline's time per token when it was timed alone; see `speed.time_in_turn`.
        progress: A function that is told what is being done.
        enough: When fewer turns of the timing are enough.
        first_answers: A function that sees what is known when the first answers to a task are there, and may raise.
        servers: The servers of the candidate and of the base model, which are timed in the engines' place, for a
            workload of kind serve.

    Raises:
        NotFinite: The model is broken.
        EvaluationError: An engine raised it.
        ValueError: The request is timed and there is no baseline.
    """
    seconds = dict(engine.seconds)
    timing, gpu = UNTIMED, None
    if request.timed:
        pair: Pair
        if servers is not None:
            pair = servers
        elif baseline is not None:
            pair = engine, baseline
        else:
            raise ValueError("measure: a candidate is timed against the baseline's engine, and none was given")
        timing, gpu = _time(engine.facts(), pair, request, seconds, progress, expected_base_ms, enough)
    measured = _measure(path, engine, request, timing, seconds, weights_sha256, progress, first_answers)
    return _with_served(_watched(measured, gpu), None if servers is None else servers[0])


def with_timing(measurement: Measurement, timing: Timing) -> Measurement:
    """Return the same measurement with another timing."""
    return dataclasses.replace(measurement, **_timing(timing, measurement.tokens_per_answer))


# -- the stages ----------------------------------------------------------------------------------------------


def _with_served(measurement: Measurement, server: serve_bench.Timed | None) -> Measurement:
    """Return the measurement with what the server did under each load."""
    return measurement if server is None else dataclasses.replace(measurement, served=server.means())


def _time(
    facts: Mapping[str, str],
    pair: Pair,
    request: Request,
    seconds: dict[str, float],
    progress: Progress,
    expected_base_ms: float | None = None,
    enough: speed.Enough = speed.ALL_TURNS,
) -> tuple[Timing, GpuRecord | None]:
    def turned(done: int, total: int) -> None:
        watch.look()
        _say(progress, f"timing, turn {done} of {total}")

    with _stage("time", seconds):
        watch = GpuWatch.of(facts)
        timing = speed.time_in_turn(
            *pair,
            request.workload,
            turned,
            expected_base_ms=expected_base_ms,
            enough=enough,
            steady=watch.steady,
        )
    return timing, watch.record


def _watched(measurement: Measurement, gpu: GpuRecord | None) -> Measurement:
    """Return the measurement with what the GPU did during its timing, and a note where that spoils it."""
    if gpu is None:
        return measurement
    return dataclasses.replace(measurement, gpu=gpu, notes=(*measurement.notes, *gpu.warnings))


def _measure(
    path: str | Path,
    engine: EngineProcess,
    request: Request,
    timing: Timing,
    seconds: dict[str, float],
    weights_sha256: str | None,
    progress: Progress,
    first_answers: FirstAnswers = None,
) -> Measurement:
    """Measure all that is not timing; `seconds` gains an entry for each stage."""
    nll: list[list[float]] = []  # of each token, one list for each shard
    with _stage("nll", seconds):
        for index, shard in enumerate(request.shards):
            _say(progress, f"quality, shard {index + 1} of {len(request.shards)}")
            nll.append([value for window in engine.nll(shard) for value in window])
    loss = loss_of(nll)
    if not math.isfinite(loss.perplexity):
        raise NotFinite(
            f"{Path(path).name}: its loss of {loss.nll:g} nats per token has no finite perplexity; it is broken"
        )
    results: dict[str, TaskResult] = {}
    if request.tasks:
        with _stage("tasks", seconds):
            for task in request.tasks:
                _say(progress, f"task {task.name}")
                told = functools.partial(_say, progress)
                if first_answers is not None and task.writes:
                    look = _look(first_answers, Partial(loss, timing, dict(results), task.name))
                    results[task.name] = task.run(engine, told, look)
                else:
                    results[task.name] = task.run(engine, told)
    with _stage("digest", seconds):
        _say(progress, "digests")
        logits_sha256 = engine.logits_sha256(request.shards[0][0])
        described = checkpoint_files.describe(Path(path))
        weights = weights_sha256 or checkpoint_files.weights_sha256_of(Path(path))
    found = _Found(loss, results, described, engine.facts(), logits_sha256, weights)
    return _assembled(request, timing, found, seconds)


def _look(first_answers: Callable[[Partial], None], known: Partial) -> Callable[[Sequence[float]], None]:
    """Return the function that a task shows its first scores."""
    return lambda correct: first_answers(dataclasses.replace(known, correct=tuple(correct)))


@contextlib.contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started


def _say(progress: Progress, what: str) -> None:
    if progress is not None:
        progress(what)


# -- arithmetic and assembly ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of a model on a text, in nats per token.

    Attributes:
        nll: The mean over all tokens.
        se: The standard error of the mean, from the shards.
        shard_nll: The mean over each shard's tokens.
        tokens: The number of tokens that were predicted.
        perplexity: The exponential of `nll`; infinite where that overflows.
    """

    nll: float
    se: float
    shard_nll: tuple[float, ...]
    tokens: int
    perplexity: float


def loss_of(nll: Sequence[Sequence[float]]) -> Loss:
    """Return the loss of a text from each token's negative log-likelihood, one list for each shard."""
    tokens = sum(map(len, nll))
    mean = math.fsum(value for shard in nll for value in shard) / tokens
    shard_nll = tuple(math.fsum(shard) / len(shard) for shard in nll)
    return Loss(mean, standard_error(shard_nll), shard_nll, tokens, quality.perplexity(mean))


def _as_base(timing: Timing) -> Timing:
    """Return a timing of the base model against itself as the base model's own."""
    return dataclasses.replace(
        timing,
        base_time_per_token_ms=timing.time_per_token_ms,
        base_time_per_token_ms_se=timing.time_per_token_ms_se,
        time_ratio=1.0,
    )


@dataclasses.dataclass(frozen=True)
class _Found:
    loss: Loss
    tasks: dict[str, TaskResult]
    described: checkpoint_files.Described
    facts: dict[str, str]
    logits_sha256: str
    weights_sha256: str


def _assembled(request: Request, timing: Timing, found: _Found, seconds: dict[str, float]) -> Measurement:
    loss, described, facts = found.loss, found.described, found.facts
    tokens_per_answer = lengths.mean_of(found.tasks)
    notes = tuple(f"{name}: {facts[name]}" for name in NOTED if name in facts)
    return Measurement(
        perplexity=loss.perplexity,
        nll_nats_per_token=loss.nll,
        nll_nats_per_token_se=loss.se,
        tokens=loss.tokens,
        shard_nll=loss.shard_nll,
        **_timing(timing, tokens_per_answer),
        tokens_per_answer=tokens_per_answer,
        model_size_mb=described.bytes / 1e6,
        total_parameters=described.parameters,
        number_of_layers=described.layers,
        number_of_heads=described.heads,
        hidden_dim=described.hidden,
        backend=facts["backend"],
        engine_version=facts["engine_version"],
        transformers_version=facts["transformers_version"],
        torch_version=facts["torch_version"],
        device=facts["device"],
        dtype=facts["dtype"],
        workload=dataclasses.replace(request.workload, asked=()),
        text_digest=texts.text_digest([window for shard in request.shards for window in shard]),
        logits_sha256=found.logits_sha256,
        weights_sha256=found.weights_sha256,
        seconds={stage: round(spent, 3) for stage, spent in seconds.items()},
        notes=notes if request.timed else (*notes, UNTIMED_NOTE),
        tasks=found.tasks,
    )


def _timing(timing: Timing, tokens_per_answer: float | None) -> dict[str, Any]:
    known = tokens_per_answer is not None and timing.samples > 0
    return {
        "seconds_per_answer": timing.time_per_token_ms / 1e3 * (tokens_per_answer or 0.0) if known else None,
        "time_per_token_ms": timing.time_per_token_ms,
        "time_per_token_ms_se": timing.time_per_token_ms_se,
        "base_time_per_token_ms": timing.base_time_per_token_ms,
        "base_time_per_token_ms_se": timing.base_time_per_token_ms_se,
        "time_ratio": timing.time_ratio,
        "time_ratio_se": timing.time_ratio_se,
        "timing_samples": timing.samples,
        "tokens_per_sec": 1e3 / timing.time_per_token_ms,
    }
