"""Distills a compressed model from the model that it was made of, and writes the result to its own directory.

The model is trained on a part of the calibration text and evaluated on the other part while it trains.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressors.distillation import distill
from compressors.distillation.distill import Distillation, Distilled, Progress
from compressors.files import digest_of_json, write_json
from compressors.model import checkpoint
from compressors.model.loading import broken_named, write_checked
from compressors.plan import DESCRIPTION
from evaluator import texts
from search import files
from search.errors import UsageError
from search.files import read_json
from search.say import Say
from search.setup.machine import require_disk
from search.setup.setting import Setting
from search.setup.texts import calibration_documents, tokenizer_of

HELD_OUT = 0.1  # share of the calibration text's documents


@dataclasses.dataclass(frozen=True)
class Text:
    """Text holds the windows of token ids that a distillation reads.

    Attributes:
        windows: The windows to train on.
        held_out: The windows to evaluate on, from other documents.
    """

    windows: list[list[int]]
    held_out: list[list[int]]

    @functools.cached_property
    def digest(self) -> str:
        """Return the digests of both parts."""
        return f"{texts.text_digest(self.windows)} {texts.text_digest(self.held_out)}"


def settings_of(setting: Setting, tokens: int) -> Distillation:
    """Return the settings of the study file's `distillation`, for `tokens` tokens in windows of text.window."""
    section = setting.file.distillation
    return Distillation(tokens=tokens, window=setting.file.text.window, **section.model_dump(exclude={"tokens"}))


def text_of(setting: Setting, settings: Distillation) -> Text:
    """Return the whole calibration text, split by document. Raises UsageError where a part has no window."""
    trained, kept = texts.split(calibration_documents(setting.texts), 1.0 - HELD_OUT)
    tokenizer = tokenizer_of(setting.model.path)
    windows, held_out = (texts.all_windows(tokenizer, documents, settings.window) for documents in (trained, kept))
    if not windows or not held_out:
        raise UsageError(
            f"distill: the calibration text makes {len(windows)} windows of {settings.window} tokens to train on and "
            f"{len(held_out)} to judge on; give more text (text.calibration), or a shorter text.window"
        )
    return Text(windows, held_out)


def distill_model(
    setting: Setting,
    student_path: Path,
    tokens: int,
    to: Path,
    target: str | None,
    say: Say,
    *,
    text: Text | None = None,
) -> Distilled:
    """Distill a checkpoint from the study file's model.

    The state is kept under outputs/ until the result is written, so that a killed call can be resumed.

    Args:
        setting: The setting of the study file.
        student_path: The directory of the checkpoint that is trained.
        tokens: The number of tokens to train on.
        to: The directory to write.
        target: The version of transformers that is to read the result; None for the running one.
        say: Is called with the current step.
        text: The text of this setting, to spare the time; None to read it here.

    Raises:
        UsageError: `to` can't be written, or there is too little text.
        CompressionError: The checkpoint can't be read or trained.
    """
    files.refuse_foreign(to, "distill", *setting.sources, student_path)
    student = checkpoint.Checkpoint.read(student_path)
    settings = settings_of(setting, tokens)
    text = text or text_of(setting, settings)
    # float32 weights, AdamW's two moments and the best student so far; the old ones stay until the new ones are written
    require_disk(student.total_parameters * 32, setting.outputs, "the distillation's state")
    student_digest = checkpoint.digest_of(student_path, setting.outputs / "digests")
    work = setting.outputs / "distillation" / key(setting, student_digest, settings, text)

    def progress(step: Progress) -> None:
        say(_line(step))

    teacher = setting.model.checkpoint
    with broken_named(student=student, teacher=teacher):
        distilled = distill.distill(
            student, teacher, text.windows, text.held_out, settings, setting.machine.device, work, progress
        )
    plan = (read_json(student_path / DESCRIPTION) or {}).get("plan")
    how = {"student": plan, "settings": dataclasses.asdict(settings), **facts(distilled)}
    write(distilled.checkpoint, to, target, setting, how)
    shutil.rmtree(work, ignore_errors=True)
    return distilled


def write(
    distilled: checkpoint.Checkpoint, to: Path, target: str | None, setting: Setting, how: Mapping[str, Any]
) -> None:
    """Write a distilled checkpoint to the directory `to`, which appears whole or not at all.

    No plan alone makes these weights, so compression.json names no plan as theirs.

    Args:
        distilled: The distilled checkpoint.
        to: The directory to write.
        target: The version of transformers that is to read it; None for the running one.
        setting: The setting of the study file.
        how: How it was distilled, for compression.json.

    Raises:
        UsageError: `to` can't be written.
        CompressionError: The checkpoint can't be written for that version.
    """
    with files.atomic_directory(to, "distill") as scratch:
        weights_sha256, _ = write_checked(distilled, scratch, setting.model.checkpoint, target)
        write_json(
            scratch / DESCRIPTION,
            {
                "distilled": dict(how),
                "base": {"source": setting.file.source_shown, "digest": setting.model.digest},
                "for_transformers": target,
                "weights_sha256": weights_sha256,
            },
        )


def key(setting: Setting, student: str, settings: Distillation, text: Text) -> str:
    """Return a name of the distillation, from everything that its result depends on.

    Args:
        setting: The setting of the study file.
        student: The digest of the checkpoint that is trained, or of its plan.
        settings: The settings of the distillation.
        text: The text of the distillation.
    """
    values = dataclasses.asdict(settings)
    del values["save_every"]
    return digest_of_json([setting.model.digest, student, values, text.digest, setting.machine.device], 16)


def facts(distilled: Distilled) -> dict[str, Any]:
    """Return what a distillation did, without its checkpoint, as plain JSON values."""
    return {
        field.name: getattr(distilled, field.name)
        for field in dataclasses.fields(distilled)
        if field.name not in ("checkpoint", "evaluations")
    } | {"evaluations": [dataclasses.asdict(one) for one in distilled.evaluations]}


def _line(step: Progress) -> str:
    parts = [f"distilling: {step.stage}"]
    if step.tokens:
        parts.append(f"{step.tokens / 1e3:,.0f}k of {step.total_tokens / 1e3:,.0f}k tokens")
    if step.tokens_per_second:
        parts.append(f"{step.tokens_per_second:,.0f} tokens per second")
    if step.held_out_kl is not None:
        parts.append(f"held-out KL {step.held_out_kl:.4f}")
    return ", ".join(parts)
