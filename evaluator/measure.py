"""One checkpoint, one engine, a Measurement: timing first, on a quiet machine, then quality, then the digests."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluator import quality, speed, texts
from evaluator.errors import EvaluationError, NotFinite
from evaluator.measurement import Measurement, TaskResult, Timing, Workload
from evaluator.process import EngineProcess
from evaluator.score import PERPLEXITY, standard_error
from evaluator.tasks import Task

UNTIMED = Timing(1.0, 0.0, 1.0, 0.0, 1.0, 0.0, samples=0)
UNTIMED_NOTE = "nothing was timed: time_per_token_ms and tokens_per_sec are relative to the baseline's 1"

Shards = Sequence[Sequence[Sequence[int]]]  # shards of windows of token ids


def measure(
    path: str | Path,
    engine: EngineProcess,
    baseline: EngineProcess | None,
    shards: Shards,
    workload: Workload,
    *,
    weights_sha256: str | None = None,
    time_it: bool = True,
    expected_base_ms: float | None = None,
    progress: Callable[[str], None] | None = None,
    tasks: Sequence[Task] = (),
) -> Measurement:
    """Measure the checkpoint in `path`, which `engine` has loaded.

    baseline: the base model's engine, timed in turn with it; None: this is the base model, its ratio is 1 and the error
        that of timing it against itself.
    shards: of windows of token ids, all of them used. weights_sha256: of model.safetensors, if it is known.
    expected_base_ms: the baseline's time per token as it was measured alone; see `speed.time_in_turn`.
    progress: told what is being done. tasks: run after the perplexity; each has a name of its own.

    Raises NotFinite for a broken model, and what the engines raise.
    """
    say = progress or (lambda _: None)
    named = [task.name for task in tasks]
    if len({*named, PERPLEXITY}) <= len(named):
        raise EvaluationError(
            f"tasks: {', '.join(named)}: each needs a name of its own, and {PERPLEXITY} is the text's; rename one"
        )
    seconds = dict(engine.seconds)
    timing = UNTIMED
    if time_it:
        started = time.monotonic()
        timing = speed.time_in_turn(
            engine,
            engine if baseline is None else baseline,
            workload,
            lambda done, total: say(f"timing, turn {done} of {total}"),
            expected_base_ms=expected_base_ms,
        )
        if baseline is None:
            timing = dataclasses.replace(
                timing,
                base_time_per_token_ms=timing.time_per_token_ms,
                base_time_per_token_ms_se=timing.time_per_token_ms_se,
                time_ratio=1.0,
            )
        seconds["time"] = time.monotonic() - started
    started = time.monotonic()
    nll: list[list[float]] = []  # of each token, a list a shard
    for index, shard in enumerate(shards):
        say(f"quality, shard {index + 1} of {len(shards)}")
        nll.append([value for window in engine.nll(shard) for value in window])
    seconds["nll"] = time.monotonic() - started
    tokens = sum(map(len, nll))
    total = math.fsum(value for shard_values in nll for value in shard_values) / tokens
    shard_nll = tuple(math.fsum(values) / len(values) for values in nll)
    perplexity = quality.perplexity(total)
    if not math.isfinite(perplexity):
        raise NotFinite(
            f"{Path(path).name}: its loss of {total:g} nats per token has no finite perplexity; it is broken"
        )
    results: dict[str, TaskResult] = {}
    if tasks:
        started = time.monotonic()
        for task in tasks:
            say(f"task {task.name}")
            results[task.name] = task.run(engine, say)
        seconds["tasks"] = time.monotonic() - started
    started = time.monotonic()
    say("digests")
    logits_sha256 = engine.logits_sha256(shards[0][0])
    described = describe(Path(path))
    weights = weights_sha256 or weights_sha256_of(Path(path))
    seconds["digest"] = time.monotonic() - started
    facts = engine.facts()
    notes = tuple(f"{name}: {facts[name]}" for name in ("quantization_kernel", "threads") if name in facts)
    measured = Measurement(
        perplexity=perplexity,
        nll_nats_per_token=total,
        nll_nats_per_token_se=standard_error(shard_nll),
        tokens=tokens,
        shard_nll=shard_nll,
        **_timing(timing),
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
        workload=workload,
        text_digest=texts.text_digest([window for shard in shards for window in shard]),
        logits_sha256=logits_sha256,
        weights_sha256=weights,
        seconds={stage: round(spent, 3) for stage, spent in seconds.items()},
        notes=notes if time_it else (*notes, UNTIMED_NOTE),
        tasks=results,
    )
    return measured


def with_timing(measurement: Measurement, timing: Timing) -> Measurement:
    """The same measurement with another timing."""
    return dataclasses.replace(measurement, **_timing(timing))


def _timing(timing: Timing) -> dict[str, Any]:
    return {
        "time_per_token_ms": timing.time_per_token_ms,
        "time_per_token_ms_se": timing.time_per_token_ms_se,
        "base_time_per_token_ms": timing.base_time_per_token_ms,
        "base_time_per_token_ms_se": timing.base_time_per_token_ms_se,
        "time_ratio": timing.time_ratio,
        "time_ratio_se": timing.time_ratio_se,
        "timing_samples": timing.samples,
        "tokens_per_sec": 1e3 / timing.time_per_token_ms,
    }


# -- what a checkpoint directory says of itself --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Described:
    """bytes: of its weight files. parameters: of the dequantized model, a tied embedding counted once."""

    bytes: int
    parameters: int
    layers: int
    heads: int
    hidden: int


def describe(path: Path) -> Described:
    """From config.json and the safetensors headers; no weight is read. Raises EvaluationError."""
    try:
        config = json.loads((path / "config.json").read_text())
        files = weight_files(path)
        return Described(
            bytes=sum(file.stat().st_size for file in files),
            parameters=sum(_parameters(file, config) for file in files),
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            hidden=int(config["hidden_size"]),
        )
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise EvaluationError(f"{path}: is not a readable checkpoint: {type(error).__name__}: {error}") from None


def weight_files(path: Path) -> list[Path]:
    """model.safetensors, or the shards of one, sorted by name. Raises EvaluationError where there is none."""
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise EvaluationError(f"{path}: holds no model.safetensors; name a checkpoint directory")
    return files


def weights_sha256_of(path: Path) -> str:
    """sha256 of model.safetensors; of a sharded one, of its files' bytes in the order of their names."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        with file.open("rb") as source:
            while block := source.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _parameters(file: Path, config: dict[str, Any]) -> int:
    """Logical parameters of a safetensors file, compressed-tensors' packing and scales undone."""
    with file.open("rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        if length > file.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(source.read(length))
    header.pop("__metadata__", None)
    per_word = 32 // _bits(config)
    total = 0
    for name, tensor in header.items():
        part = name.rpartition(".")[2]
        if part in ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale"):
            continue
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        size = math.prod(tensor["shape"])
        total += size * per_word if part == "weight_packed" else size
    return total


def _bits(config: dict[str, Any]) -> int:
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    for group in groups.values():
        return int((group.get("weights") or {}).get("num_bits") or 32)
    return 32
