"""Distillation by hand: a compressed model learns from the model that it was made of, and is written beside it.

Trained on the calibration text; judged, while it trains, on documents of it that it does not see.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from compressors import checkpoint
from compressors.methods import distill
from compressors.methods.distill import Distillation, Distilled, Progress
from compressors.target import retarget
from evaluator import texts
from search import compress, places
from search.errors import UsageError
from search.setting import Say, Setting, calibration_documents, read_json, require_disk, tokenizer_of, write_json

HELD_OUT = 0.1  # of the calibration text's documents


def settings_of(setting: Setting, tokens: int) -> Distillation:
    """The study file's `distillation`, on windows of text.window tokens."""
    section = setting.file.distillation
    return Distillation(tokens=tokens, window=setting.file.text.window, **section.model_dump(exclude={"tokens"}))


def distil(setting: Setting, student_path: Path, tokens: int, to: Path, target: str | None, say: Say) -> Distilled:
    """Distil the checkpoint in `student_path` from the study file's model into `to`.

    Its state is kept under outputs/ until `to` is written, so that a killed call goes on. target: the version of
    transformers that is to read it. Raises UsageError and CompressionError.
    """
    places.refuse_foreign(to, "distill")
    student = checkpoint.Checkpoint.read(student_path)
    settings = settings_of(setting, tokens)
    windows, held_out = _windows(setting, settings)
    require_disk(student.total_parameters * 20 + 50_000_000, setting.outputs, "the distillation's state")
    work = setting.outputs / "distillation" / _key(setting, student_path, settings)
    found = distill.distill(
        student, setting.base, windows, held_out, settings, setting.device, work, lambda step: say(_line(step))
    )
    with places.beside(to, "distill") as scratch:
        weights_sha256 = found.checkpoint.write(scratch)
        if target is not None:
            retarget(scratch, target)
        plan = (read_json(student_path / compress.DESCRIPTION) or {}).get("plan")
        made = {"student": plan, "settings": dataclasses.asdict(settings), **facts(found)}
        write_json(
            scratch / compress.DESCRIPTION,
            {
                "distilled": made,
                "base": {"source": setting.file.model.source, "digest": setting.base_digest},
                "for_transformers": target,
                "weights_sha256": weights_sha256,
            },
        )
    shutil.rmtree(work, ignore_errors=True)
    return found


def facts(found: Distilled) -> dict[str, Any]:
    """What a distillation did, without its checkpoint."""
    return {
        field.name: getattr(found, field.name)
        for field in dataclasses.fields(found)
        if field.name not in ("checkpoint", "evaluations")
    } | {"evaluations": [dataclasses.asdict(one) for one in found.evaluations]}


def _windows(setting: Setting, settings: Distillation) -> tuple[list[list[int]], list[list[int]]]:
    """(to train on, held out): all that the calibration text has, split by document."""
    trained, kept = texts.split(calibration_documents(setting.file), 1.0 - HELD_OUT)
    tokenizer = tokenizer_of(setting.base_path)
    windows, held_out = (texts.all_windows(tokenizer, documents, settings.window) for documents in (trained, kept))
    if not windows or not held_out:
        raise UsageError(
            f"distill: the calibration text makes {len(windows)} windows of {settings.window} tokens to train on and "
            f"{len(held_out)} to judge on; give more text (text.calibration), or a shorter text.window"
        )
    return windows, held_out


def _key(setting: Setting, student: Path, settings: Distillation) -> str:
    student_digest = checkpoint.digest_of(student, setting.outputs / "digests")
    text = json.dumps([setting.base_digest, student_digest, dataclasses.asdict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _line(step: Progress) -> str:
    parts = [f"distilling: {step.stage}"]
    if step.tokens:
        parts.append(f"{step.tokens / 1e3:,.0f}k of {step.total_tokens / 1e3:,.0f}k tokens")
    if step.tokens_per_second:
        parts.append(f"{step.tokens_per_second:,.0f} tokens per second")
    if step.held_out_kl is not None:
        parts.append(f"held-out KL {step.held_out_kl:.4f}")
    return ", ".join(parts)
