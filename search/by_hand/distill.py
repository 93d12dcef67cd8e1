"""Distillation: a compressed model learns from the model that it was made of, and is written to a place of its own.

Trained on the calibration text; judged, while it trains, on documents of it that it does not see.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressors.distillation import distill
from compressors.distillation.distill import Distillation, Distilled, Progress
from compressors.files import write_json
from compressors.model import checkpoint
from compressors.model.transformers_version import retarget
from compressors.plan import DESCRIPTION
from evaluator import texts
from search import files
from search.errors import UsageError
from search.files import read_json
from search.setup.machine import require_disk
from search.setup.setting import Say, Setting
from search.setup.texts import calibration_documents, tokenizer_of

HELD_OUT = 0.1  # of the calibration text's documents


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows of token ids. held_out: of documents that `windows` has nothing of."""

    windows: list[list[int]]
    held_out: list[list[int]]

    @functools.cached_property
    def digest(self) -> str:
        return f"{texts.text_digest(self.windows)} {texts.text_digest(self.held_out)}"


def settings_of(setting: Setting, tokens: int) -> Distillation:
    """The study file's `distillation`, on windows of text.window tokens."""
    section = setting.file.distillation
    return Distillation(tokens=tokens, window=setting.file.text.window, **section.model_dump(exclude={"tokens"}))


def text_of(setting: Setting, settings: Distillation) -> Text:
    """All that the calibration text has, split by document. Raises UsageError where that is too little."""
    trained, kept = texts.split(calibration_documents(setting.file), 1.0 - HELD_OUT)
    tokenizer = tokenizer_of(setting.base_path)
    windows, held_out = (texts.all_windows(tokenizer, documents, settings.window) for documents in (trained, kept))
    if not windows or not held_out:
        raise UsageError(
            f"distill: the calibration text makes {len(windows)} windows of {settings.window} tokens to train on and "
            f"{len(held_out)} to judge on; give more text (text.calibration), or a shorter text.window"
        )
    return Text(windows, held_out)


def distil(
    setting: Setting,
    student_path: Path,
    tokens: int,
    to: Path,
    target: str | None,
    say: Say,
    *,
    text: Text | None = None,
) -> Distilled:
    """Distil the checkpoint in `student_path` from the study file's model into `to`.

    Its state is kept under outputs/ until `to` is written, so that a killed call goes on. target: the version of
    transformers that is to read it. text: `text_of` this setting, where it is at hand. Raises UsageError and
    CompressionError.
    """
    files.refuse_foreign(to, "distill", setting.base_path, student_path)
    student = checkpoint.Checkpoint.read(student_path)
    settings = settings_of(setting, tokens)
    text = text or text_of(setting, settings)
    # float32 weights and AdamW's two moments, and the best student so far: the new ones are written beside the old ones
    require_disk(student.total_parameters * 32 + 50_000_000, setting.outputs, "the distillation's state")
    student_digest = checkpoint.digest_of(student_path, setting.outputs / "digests")
    work = setting.outputs / "distillation" / key(setting, student_digest, settings, text)

    def progress(step: Progress) -> None:
        say(_line(step))

    found = distill.distill(
        student, setting.base, text.windows, text.held_out, settings, setting.device, work, progress
    )
    plan = (read_json(student_path / DESCRIPTION) or {}).get("plan")
    how = {"student": plan, "settings": dataclasses.asdict(settings), **facts(found)}
    write(found.checkpoint, to, target, setting, how)
    shutil.rmtree(work, ignore_errors=True)
    return found


def write(made: checkpoint.Checkpoint, to: Path, target: str | None, setting: Setting, how: Mapping[str, Any]) -> None:
    """What a distillation made, whole or not at all. how: what compression.json says of it.

    No plan alone makes these weights, so none is named as theirs. Raises UsageError and CompressionError.
    """
    with files.beside(to, "distill") as scratch:
        weights_sha256 = made.write(scratch)
        if target is not None:
            retarget(scratch, target)
        write_json(
            scratch / DESCRIPTION,
            {
                "distilled": dict(how),
                "base": {"source": setting.file.model.source, "digest": setting.base_digest},
                "for_transformers": target,
                "weights_sha256": weights_sha256,
            },
        )


def key(setting: Setting, student: str, settings: Distillation, text: Text) -> str:
    """Names a distillation by all that its result depends on. student: a digest of the model, or of its plan."""
    values = dataclasses.asdict(settings)
    del values["save_every"]
    said = json.dumps([setting.base_digest, student, values, text.digest, setting.device], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def facts(found: Distilled) -> dict[str, Any]:
    """What a distillation did, without its checkpoint."""
    return {
        field.name: getattr(found, field.name)
        for field in dataclasses.fields(found)
        if field.name not in ("checkpoint", "evaluations")
    } | {"evaluations": [dataclasses.asdict(one) for one in found.evaluations]}


def _line(step: Progress) -> str:
    parts = [f"distilling: {step.stage}"]
    if step.tokens:
        parts.append(f"{step.tokens / 1e3:,.0f}k of {step.total_tokens / 1e3:,.0f}k tokens")
    if step.tokens_per_second:
        parts.append(f"{step.tokens_per_second:,.0f} tokens per second")
    if step.held_out_kl is not None:
        parts.append(f"held-out KL {step.held_out_kl:.4f}")
    return ", ".join(parts)
