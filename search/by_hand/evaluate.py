"""Any checkpoint against the baseline: measured as a study's trials are, and kept beside its weights.

A checkpoint that a plan made here has the numbers of a trial of that plan: quality exactly, time within its error.
One of another origin is measured the same way, if it loads and reads the same tokens.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.device import compute_dtype, release
from compressors.errors import CheckpointError
from compressors.files import write_json
from compressors.model import structure
from compressors.plan import DESCRIPTION, CompressionPlan
from evaluator import measure, quality, score, texts
from evaluator.measurement import Measurement
from evaluator.process import EngineProcess
from evaluator.score import Score
from search.errors import UsageError
from search.files import read_json
from search.setup.machine import require_memory
from search.setup.setting import Setting, report_shards
from search.setup.texts import tokenizer_of
from search.stages.bench import BASELINE_RESULT, Bench
from search.stages.screen import Screen, mean_known

RESULT = "eval_result.json"
SAMPLE = 20_000  # characters of the search text that two tokenizers have to read alike


@dataclasses.dataclass(frozen=True)
class Confirmed:
    """On text that neither calibration nor search saw: perplexities, PerfNorm and its standard error."""

    perplexity: float
    base_perplexity: float
    perf_norm: float
    perf_norm_se: float
    text_digest: str


def result(
    setting: Setting,
    measurement: Measurement,
    baseline: Measurement,
    plan: CompressionPlan | None,
    confirmed: Confirmed | None = None,
) -> dict[str, Any]:
    """What is kept beside the weights: all that a report needs, in plain JSON values."""
    return {
        **dataclasses.asdict(score.score_of(measurement, baseline, setting.formula)),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "model": {"source": setting.file.model.source, "digest": setting.base_digest},
        "description": setting.file.description,
        "plan": None if plan is None else plan.to_dict(),
        "base_plan": setting.identity.to_dict(),
        "formula": dataclasses.asdict(setting.formula),
        "circumstances": setting.circumstances,
        "measurement": measurement.to_dict(),
        "baseline": baseline.to_dict(),
        "report_text": None if confirmed is None else dataclasses.asdict(confirmed),
        "settings": setting.file.model_dump(mode="json", exclude={"storage"}),  # its URL may hold a password
    }


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A checkpoint that can be evaluated. plan: what made it of this base model, if that is known."""

    path: Path
    weights_sha256: str
    plan: CompressionPlan | None


def evaluate(bench: Bench, candidate: Candidate, name: str, words: Sequence[str] = ()) -> dict[str, Any]:
    """Measure the candidate against the baseline, write eval_result.json into its directory and return what it holds.

    words: of the command line that chose the study file, so that a report can say how to do it again. Raises
    UsageError, CheckpointError and what the engines raise; then nothing is written.
    """
    setting, path, plan = bench.setting, candidate.path, candidate.plan
    described = measure.describe(path)
    baseline = bench.baseline()
    report = report_shards(setting)
    base_report = _base_report(bench, report) if report else None
    if plan is not None:
        screen = bench.screen(plan)
    else:
        require_memory(described.parameters * (4 if setting.device == "cpu" else 2), setting.device, "this model")
        screen = _screen_of_directory(bench, path)
    nll: list[list[list[float]]] = []
    measured = bench.measure(
        path, candidate.weights_sha256, then=lambda engine: nll.extend(_nll(engine, report, bench.say))
    )
    measured = dataclasses.replace(
        measured, kl_nats_per_token=mean_known(screen.kl), top1_agreement=mean_known(screen.agreement)
    )
    confirmed = None if base_report is None else _confirmed(nll, base_report, report)
    found = {"name": name, "words": list(words), **result(setting, measured, baseline, plan, confirmed)}
    try:
        write_json(path / RESULT, found)
    except OSError as error:
        raise UsageError(f"evaluate: {path / RESULT}: {error.strerror or error}; nothing was written there") from None
    return found


def candidate_in(path: Path, setting: Setting) -> Candidate:
    """Raises UsageError and CheckpointError for what can't be evaluated, before anything is measured."""
    if not path.is_dir():
        raise UsageError(f"evaluate: {path}: no such directory; name a checkpoint, such as submit/model")
    structure.describe_any(path)
    weights_sha256 = measure.weights_sha256_of(path)
    plan = plan_in(path, weights_sha256, setting)
    if plan is None:
        _require_same_tokens(path, setting)
    return Candidate(path, weights_sha256, plan)


def known(path: Path, setting: Setting) -> dict[str, Any] | None:
    """The evaluation in `path` if nothing that it depends on has changed since: weights, baseline, workload, engine."""
    found = read_json(path / RESULT)
    if found is None or found.get("circumstances") != json.loads(json.dumps(setting.circumstances)):
        return None
    if found["model"]["digest"] != setting.base_digest or found["formula"] != _plain(setting.formula):
        return None
    if found["measurement"]["weights_sha256"] != measure.weights_sha256_of(path):
        return None
    report = report_shards(setting)
    if (found.get("report_text") or {}).get("text_digest") != (_digest(report) if report else None):
        return None
    return found


def stale_baseline(setting: Setting) -> str | None:
    """Why the baseline in outputs/ is not this one, or None when it is, or when there is none."""
    there = read_json(setting.outputs / BASELINE_RESULT)
    if there is None or "circumstances" not in there:
        return None
    now = {"model": setting.base_digest, **json.loads(json.dumps(setting.circumstances))}
    then = {"model": there["model"]["digest"], **there["circumstances"]}
    differing = [f"{key} was {then.get(key)}, is {now.get(key)}" for key in now if then.get(key) != now.get(key)]
    return "; ".join(differing) or None


def plan_in(path: Path, weights_sha256: str, setting: Setting) -> CompressionPlan | None:
    """The plan that made the weights in `path` of this base model, if it says so and they are still those."""
    described = read_json(path / DESCRIPTION) or {}
    if described.get("weights_sha256") != weights_sha256 or "plan" not in described:
        return None
    try:
        plan = CompressionPlan.from_dict(described["plan"])
    except TypeError:
        return None
    return plan if described.get("plan_digest") == setting.plan_digest(plan) else None


def _screen_of_directory(bench: Bench, path: Path) -> Screen:
    """KL and agreement of a checkpoint of any origin that stock transformers loads; quantised ones are dequantized."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = bench.setting.device
    bench.say("quality in memory")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=compute_dtype(device) or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # whatever the library raises for a directory from outside
        first = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise CheckpointError(f"model {path}: stock transformers can't load it ({first})") from None
    try:
        return bench.screen_of(model.to(device).eval().requires_grad_(False))
    finally:
        del model
        release(device)


def _require_same_tokens(path: Path, setting: Setting) -> None:
    """Perplexities per token of two tokenizers can't be compared."""
    sample = "\n\n".join(document.text for document in texts.embedded_documents())[:SAMPLE]
    own, base = (
        tokenizer_of(where).encode(sample, add_special_tokens=False, verbose=False)
        for where in (path, setting.base_path)
    )
    if own != base:
        raise UsageError(
            f"evaluate: {path}: its tokenizer reads text otherwise than the base model's "
            f"({setting.file.model.source}), "
            "so that their perplexities can't be compared; name its own base model with model.source="
        )


# -- the report text -----------------------------------------------------------------------------------------


def _nll(engine: EngineProcess, shards: Any, say: Callable[[str], None]) -> list[list[list[float]]]:
    found = []
    for index, shard in enumerate(shards):
        say(f"report text, shard {index + 1} of {len(shards)}")
        found.append(engine.nll(shard))
    return found


def _base_report(bench: Bench, shards: Any) -> dict[str, Any]:
    digest = _digest(shards)
    path = bench.baseline_path.with_suffix(f".report-{digest}.json")
    there = read_json(path)
    if there is None:
        there = _sums(_nll(bench.baseline_engine(), shards, lambda text: bench.say(f"baseline: {text}")))
        write_json(path, there)
    return there


def _confirmed(nll: list[list[list[float]]], base: Mapping[str, Any], shards: Any) -> Confirmed:
    mine = _sums(nll)
    perf_norm = math.exp(base["mean"] - mine["mean"])
    differences = [b - m for b, m in zip(base["shards"], mine["shards"], strict=True)]
    return Confirmed(
        perplexity=quality.perplexity(mine["mean"]),
        base_perplexity=quality.perplexity(base["mean"]),
        perf_norm=perf_norm,
        perf_norm_se=perf_norm * score.standard_error(differences),
        text_digest=_digest(shards),
    )


def _sums(nll: list[list[list[float]]]) -> dict[str, Any]:
    """Mean nats per token, over all and of each shard."""
    flat = [[value for window in shard for value in window] for shard in nll]
    return {
        "mean": math.fsum(math.fsum(values) for values in flat) / sum(map(len, flat)),
        "shards": [math.fsum(values) / len(values) for values in flat],
    }


def _digest(shards: Any) -> str:
    return texts.text_digest([window for shard in shards for window in shard])


def score_in(found: Mapping[str, Any]) -> Score:
    return Score(**{field.name: found[field.name] for field in dataclasses.fields(Score)})


def _plain(formula: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(formula)))
