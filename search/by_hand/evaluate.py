"""Measures any checkpoint against the base model, as a study measures its trials.

A checkpoint that a plan made here has the numbers of a trial of that plan: quality exactly, time within its error.
A checkpoint of another origin is measured in the same way if it loads and reads the same tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compressors import cached
from compressors.device import compute_dtype, release
from compressors.errors import CheckpointError
from compressors.files import write_json
from compressors.model import config_types, structure
from compressors.model.model_directory import require_json
from compressors.plan import DESCRIPTION, CompressionPlan
from compressors.typed_json import typed
from evaluator import checkpoint_files, embedded_texts, quality, score, texts
from evaluator.measurement import Measurement
from evaluator.process import EngineProcess
from search import secrets
from search.by_hand.evaluation import RESULT, Confirmed, Evaluation, evaluation_of, plain
from search.errors import UsageError
from search.files import read_json
from search.json_values import plan_from
from search.say import Say, silent
from search.setup import keys
from search.setup.machine import require_memory
from search.setup.setting import Setting
from search.setup.texts import report_shards, tokenizer_of
from search.stages.baseline import BASELINE_RESULT
from search.stages.bench import Bench
from search.stages.engines import once_more
from search.stages.screen import Screen, with_screen

SAMPLE = 20_000  # characters of text that two tokenizers have to read alike


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Candidate holds a checkpoint that can be evaluated.

    Attributes:
        plan: The plan that made it of this base model, if it is known.
    """

    path: Path
    weights_sha256: str
    plan: CompressionPlan | None


def evaluate_candidate(
    bench: Bench,
    candidate: Candidate,
    baseline: Measurement,
    name: str,
    say: Say,
    words: Sequence[str] = (),
    warn: Say = silent,
) -> Evaluation:
    """Measure the candidate against the baseline; write eval_result.json into its directory and return it.

    Args:
        bench: The bench to measure on.
        candidate: The checkpoint.
        baseline: The base model's measurement.
        name: The name of the evaluation.
        say: Told what is done.
        words: The words of the command line that chose the study file, so that a report can repeat them.
        warn: Told what is left out of the report text.

    Raises:
        UsageError: The result can't be written.
        CheckpointError: Stock transformers can't load the checkpoint.
        EvaluationError: An engine failed. After any error nothing is written.
    """
    setting, path, plan = bench.setting, candidate.path, candidate.plan
    described = checkpoint_files.describe(path)
    report = report_shards(setting.file, setting.texts, warn)
    base_loss = _base_loss(bench, report, say) if report else None
    if plan is not None:
        screen = bench.screen(plan, say)
    else:
        require_memory(
            described.parameters * (4 if setting.machine.device == "cpu" else 2), setting.machine.device, "this model"
        )
        screen = _screen_of_directory(bench, path, say)
    nll: list[list[list[float]]] = []

    def read_report(engine: EngineProcess) -> None:
        nll[:] = _nll(engine, report, say)  # again where an engine was killed

    measured = bench.measure(
        path,
        candidate.weights_sha256,
        baseline,
        say,
        then=read_report,
    )
    measured = with_screen(measured, screen)
    confirmed = None if base_loss is None else _confirmed(_loss_of(nll), base_loss, report)
    evaluation = evaluation_of(setting, measured, baseline, plan, name=name, words=words, report_text=confirmed)
    evaluation = evaluation.with_speeds_of(Evaluation.read(path))
    try:
        write_json(path / RESULT, evaluation.to_dict())
    except OSError as error:
        raise UsageError(f"evaluate: {path / RESULT}: {error.strerror or error}; nothing was written there") from None
    return evaluation


def candidate_in(path: Path, setting: Setting) -> Candidate:
    """Return the checkpoint in `path`, checked before anything is measured.

    Raises:
        UsageError: There is no such directory, or its tokenizer is not the base model's.
        CheckpointError: It is not a checkpoint that can be read.
    """
    if not path.is_dir():
        raise UsageError(f"evaluate: {path}: no such directory; name a checkpoint, such as submit/model")
    structure.describe_any(path)
    config_types.require_config(path, require_json(path / "config.json", "name a checkpoint"))
    weights_sha256 = checkpoint_files.weights_sha256_of(path)
    plan = plan_in(path, weights_sha256, setting)
    if plan is None:
        _require_same_tokens(path, setting)
    return Candidate(path, weights_sha256, plan)


def known_evaluation(path: Path, setting: Setting) -> Evaluation | None:
    """Return the evaluation in `path` if nothing that it depends on has changed since, else None.

    It depends on the weights, the baseline, the workload, the engine, the formula and the report text.
    """
    evaluation = cached.known(path / RESULT, Evaluation.read_whole, held=True)  # no lock file among a model's files
    if evaluation is None or evaluation.model.digest != setting.model.digest:
        return None
    if evaluation.circumstances != plain(keys.circumstances(setting)) or evaluation.formula != setting.formula:
        return None
    if evaluation.measurement.weights_sha256 != checkpoint_files.weights_sha256_of(path):
        return None
    report = report_shards(setting.file, setting.texts)
    text_digest = None if evaluation.report_text is None else evaluation.report_text.text_digest
    return evaluation if text_digest == (_digest(report) if report else None) else None


def stale_baseline(setting: Setting) -> str | None:
    """Return how the baseline in outputs/ differs from this setting's; None where it doesn't or there is none."""
    known_baseline = read_json(setting.outputs / BASELINE_RESULT)
    model, circumstances = (known_baseline or {}).get("model"), (known_baseline or {}).get("circumstances")
    if not isinstance(model, dict) or not isinstance(circumstances, dict):
        return None
    now = {"model": setting.model.digest, **plain(keys.circumstances(setting))}
    then = {"model": model.get("digest"), **circumstances}
    differing = [f"{key} was {then.get(key)}, is {now.get(key)}" for key in now if then.get(key) != now.get(key)]
    return "; ".join(differing) or None


def plan_in(path: Path, weights_sha256: str, setting: Setting) -> CompressionPlan | None:
    """Return the plan that made the weights in `path` of this base model; None where they are others."""
    described = read_json(path / DESCRIPTION) or {}
    if described.get("weights_sha256") != weights_sha256 or "plan" not in described:
        return None
    try:
        plan = plan_from(described["plan"])
    except ValueError:
        return None
    return plan if described.get("plan_digest") == keys.plan_digest(setting, plan) else None


def _screen_of_directory(bench: Bench, path: Path, say: Say) -> Screen:
    """Return KL and agreement of a checkpoint that stock transformers loads; a quantized one is dequantized."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = bench.setting.machine.device
    say("quality in memory")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=compute_dtype(device) or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # the library may raise anything for a directory from elsewhere
        first = (secrets.masked(" ".join(str(error).split())) or type(error).__name__)[:120]
        raise CheckpointError(
            f"model {path}: stock transformers can't load it ({first}); correct its config.json, or compress it again"
        ) from None
    try:
        return bench.screen_of(model.to(device).eval().requires_grad_(False), say)
    finally:
        del model
        release(device)


def _require_same_tokens(path: Path, setting: Setting) -> None:
    """Refuse a tokenizer that is not the base model's: perplexities per token could not be compared."""
    sample = "\n\n".join(document.text for document in embedded_texts.documents())[:SAMPLE]
    own, base = (
        tokenizer_of(where).encode(sample, add_special_tokens=False, verbose=False)
        for where in (path, setting.model.path)
    )
    if own != base:
        raise UsageError(
            f"evaluate: {path}: its tokenizer reads text otherwise than the base model's "
            f"({setting.file.source_shown}), "
            "so that their perplexities can't be compared; name its own base model with model.source="
        )


# -- the report text -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Loss:
    """Holds the loss on a text in nats per token: the mean over all tokens, and the mean of each shard."""

    mean: float
    shards: tuple[float, ...]


def _nll(engine: EngineProcess, shards: Any, say: Callable[[str], None]) -> list[list[list[float]]]:
    """Return the loss of each token, [shards][windows][tokens]."""
    losses = []
    for index, shard in enumerate(shards):
        say(f"report text, shard {index + 1} of {len(shards)}")
        losses.append(engine.nll(shard))
    return losses


def _base_loss(bench: Bench, shards: Any, say: Say) -> _Loss:
    """Return the base model's loss on the report text; it is measured once and kept."""
    path = keys.baseline_path(bench.setting).with_suffix(f".report-{_digest(shards)}.json")

    def read(path: Path) -> _Loss:
        loss = typed(_Loss, cached.read_json(path), "loss")
        if len(loss.shards) != len(shards):
            raise ValueError(f"it has {len(loss.shards)} shards of {len(shards)}")
        return loss

    def measure_it(path: Path) -> None:
        nll = once_more(lambda: _nll(bench.engines.baseline(), shards, lambda text: say(f"baseline: {text}")), say)
        cached.keep_json(path, dataclasses.asdict(_loss_of(nll)), digest=False)

    return cached.kept(path, read, measure_it)


def _confirmed(model: _Loss, base: _Loss, shards: Any) -> Confirmed:
    perf_norm = math.exp(base.mean - model.mean)
    differences = [b - m for b, m in zip(base.shards, model.shards, strict=True)]
    return Confirmed(
        perplexity=quality.perplexity(model.mean),
        base_perplexity=quality.perplexity(base.mean),
        perf_norm=perf_norm,
        perf_norm_se=perf_norm * score.standard_error(differences),
        text_digest=_digest(shards),
    )


def _loss_of(nll: list[list[list[float]]]) -> _Loss:
    flat = [[value for window in shard for value in window] for shard in nll]
    return _Loss(
        mean=math.fsum(math.fsum(values) for values in flat) / sum(map(len, flat)),
        shards=tuple(math.fsum(values) / len(values) for values in flat),
    )


def _digest(shards: Any) -> str:
    return texts.text_digest([window for shard in shards for window in shard])
