"""Distill: train a cut student to predict the next-token distributions of its teacher, the original model.

Hinton et al., https://arxiv.org/abs/1503.02531; for pruned language models Minitron, https://arxiv.org/abs/2407.14679,
section 3: the KL divergence of the logits alone recovers most.

The optimizer is AdamW on float32 master weights. Models compute in bfloat16 on CUDA and in float32 elsewhere: on most
CPUs bfloat16 is slow, and too coarse to tell good students apart.

A killed run that is called again with the same arguments resumes from its last saved state. It ends with the same
weights, on a CPU bit for bit. Knows no study; texts come in as token ids. A student is distilled first and quantized
afterwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from compressors.distillation import pair as distill_pair
from compressors.distillation import state as distill_state
from compressors.distillation.settings import COMPUTED_IN, Distillation, batch_of, learning_rate, require_valid
from compressors.distillation.state import Evaluation, Standing
from compressors.distillation.train import MOST_BAD, NOT_FINITE, Progress, Report, best_kl, train
from compressors.errors import CheckpointError, CompressionError
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import FLOATS
from compressors.model.model_directory import require_json

__all__ = [
    "Distillation",
    "Distilled",
    "Diverged",
    "Evaluation",
    "Progress",
    "batch_of",
    "best",
    "distill",
    "learning_rate",
]


class Diverged(CompressionError):
    """Diverged says that the loss or its gradient was not finite several batches in a row."""


@dataclasses.dataclass(frozen=True)
class Distilled:
    """Distilled is the result of a distillation.

    Attributes:
        checkpoint: The best student, in the student's dtypes and config; the student itself if no evaluation was better
            than before training. Its tensors are read from `work`, so keep that directory until they are written.
        tokens: The tokens that went through both models.
        epochs: How often each window was seen.
        updates: The number of updates.
        skipped: The number of batches without an update.
        seconds: The seconds of all calls together.
        tokens_per_second: The speed of the updates alone, without evaluations, saving and loading.
        kl_before: KL(teacher ‖ student) on the held-out windows before training, in nats per token, computed in
            `dtype`.
        kl_best: The lowest one.
        evaluations: All of them.
        flops_per_token: 6·N of the student (forward and backward) + 2·N of the teacher (forward). N are the weights
            that a
            token is multiplied by: every matrix, the head at every position, an untied embedding not. Left out are
            attention's products of activations, softmax, norms, the optimizer, and what is computed twice.
        flops_per_second: flops_per_token · tokens_per_second.
        stopped: "tokens" when all were seen, or "no improvement".
        dtype: The dtype that was computed in.
        micro_batch: The windows that ran at once.
        gradient_checkpointing: Whether activations were computed twice.
        compiled: Whether the layers were compiled.
    """

    checkpoint: Checkpoint
    tokens: int
    epochs: float
    updates: int
    skipped: int
    seconds: float
    tokens_per_second: float
    kl_before: float
    kl_best: float
    evaluations: tuple[Evaluation, ...]
    flops_per_token: int
    flops_per_second: float
    stopped: str
    dtype: str
    micro_batch: int
    gradient_checkpointing: bool
    compiled: bool


def distill(
    student: Checkpoint,
    teacher: Checkpoint,
    windows: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    settings: Distillation,
    device: str,
    work: Path,
    progress: Callable[[Progress], None],
    *,
    keep_best: bool = True,
) -> Distilled:
    """Train the student on `windows`; `held_out` judges it and is not trained on.

    Args:
        student: The cut model.
        teacher: The original model.
        windows: The windows to train on, each of `settings.window` token ids.
        held_out: The held-out windows, of the same length.
        settings: The settings.
        device: The device of both models.
        work: A directory for this distillation alone, where its state is saved.
        progress: A function that is called before and after every micro-batch and group of evaluated windows, and for
            every tensor of a saved state.
        keep_best: Whether the best student is kept in `work` and returned; without it the student is returned as it
            was, and what is wanted is the KL divergence.

    Raises:
        CheckpointError: For models that can't be distilled, the `work` of another distillation, or one that can't be
            read or written.
        CompressionError: For invalid settings, a device without memory, and when the loss was not finite three times in
            a row; then `best` returns the best student so far.
    """
    require_valid(settings)
    require_same_vocabulary(student, teacher)
    ids, held_out_ids = (
        _token_ids("windows", windows, settings, student),
        _token_ids("held_out", held_out, settings, student),
    )
    held_out_ids = held_out_ids[: settings.held_out_windows]
    _require_apart(ids, held_out_ids)
    dtype = settings.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    report = Report(progress, settings)
    report("loading")
    definition = _definition(settings, student, teacher, ids, held_out_ids, dtype, device)
    standing = distill_state.load(work, definition)
    report.begin(standing)
    if standing is None or standing.ended is None:
        try:
            report("loading")
            pair = distill_pair.make(student, teacher, COMPUTED_IN[dtype], device)
            standing = train(pair, student, ids, held_out_ids, settings, definition, work, report, standing, keep_best)
        except torch.OutOfMemoryError:
            raise CompressionError(
                f"distill: {device} has no memory left; set a smaller micro_batch, a smaller chunk, or "
                "gradient_checkpointing"
            ) from None
    _require_finite(standing, settings, work)
    return _distilled(student, teacher, standing, settings, len(ids), work, dtype, keep_best)


def best(student: Checkpoint, work: Path) -> Checkpoint | None:
    """Return the best student so far of a distillation that ended or was killed; None: none was better than before.

    Args:
        student: The student that was given to `distill`.
        work: The directory that was given to `distill`.

    Raises:
        CheckpointError: When the directory can't be read, or holds another student.
    """
    saved = distill_state.read(work)
    if saved is None or saved[1].best is None:
        return None
    tensors = distill_state.tensors(work, saved[1].best)
    foreign = sorted(
        name for name in tensors if name not in student.tensors or student.tensors[name].shape != tensors[name].shape
    )
    if foreign:
        raise CheckpointError(f"distill {work}: holds another student ({foreign[0]} differs); name its own directory")
    return dataclasses.replace(student, tensors={**student.tensors, **tensors})


def _require_finite(standing: Standing, settings: Distillation, work: Path) -> None:
    if standing.ended == NOT_FINITE:
        raise Diverged(
            f"distill: the loss or its gradient was NaN or infinite {MOST_BAD} batches in a row, at {standing.step} of "
            f"{settings.steps}, learning rate {learning_rate(standing.step - 1, settings):.3g}; set a lower "
            f"learning_rate and another directory; the best so far (held-out KL "
            f"{best_kl(standing):.4f}) is kept in {work}"
        )


def _distilled(
    student: Checkpoint,
    teacher: Checkpoint,
    standing: Standing,
    settings: Distillation,
    windows: int,
    work: Path,
    dtype: str,
    keep_best: bool,
) -> Distilled:
    if keep_best and standing.best is None and best_kl(standing) < standing.evaluations[0].held_out_kl:
        raise CheckpointError(
            f"distill {work}: its best student was not kept; name another directory, or delete it and it starts again"
        )
    tokens = standing.step * settings.batch * settings.window
    per_token = 6 * distill_pair.multiplied(student) + 2 * distill_pair.multiplied(teacher)
    rate = tokens / standing.training_seconds
    return Distilled(
        checkpoint=(best(student, work) if keep_best else None) or student,
        tokens=tokens,
        epochs=standing.step * settings.batch / windows,
        updates=standing.updates,
        skipped=standing.step - standing.updates,
        seconds=standing.seconds,
        tokens_per_second=rate,
        kl_before=standing.evaluations[0].held_out_kl,
        kl_best=best_kl(standing),
        evaluations=standing.evaluations,
        flops_per_token=per_token,
        flops_per_second=per_token * rate,
        stopped=str(standing.ended),
        dtype=dtype,
        micro_batch=standing.micro_batch,
        gradient_checkpointing=standing.gradient_checkpointing,
        compiled=standing.compiled,
    )


# -- what is refused -----------------------------------------------------------------------------------------


def require_same_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    """Check that both models are unquantized and number the same tokens.

    Raises:
        CheckpointError: When they don't.
    """
    for whose, checkpoint in (("student", student), ("teacher", teacher)):
        integers = [name for name, tensor in checkpoint.tensors.items() if tensor.dtype not in FLOATS]
        if checkpoint.config.get("quantization_config") or checkpoint.activations or integers:
            raise CheckpointError(
                f"distill: the {whose} is quantized; distill the model in a floating-point dtype, and quantize the "
                "result"
            )
    sizes = [int(checkpoint.config["vocab_size"]) for checkpoint in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"distill: the student has {sizes[0]} tokens and the teacher {sizes[1]}; both need the same vocabulary"
        )
    files = [checkpoint.files.get("tokenizer.json") for checkpoint in (student, teacher)]
    if files[0] and files[1] and files[0] != files[1] and _vocabulary(files[0]) != _vocabulary(files[1]):
        raise CheckpointError(
            f"distill: {files[0]} and {files[1]} number their tokens differently; both need the same vocabulary"
        )


def _vocabulary(tokenizer: Path) -> Any:
    model = require_json(tokenizer, "").get("model")
    return model.get("vocab") if isinstance(model, dict) else None


def _token_ids(
    what: str, windows: Sequence[Sequence[int]], settings: Distillation, student: Checkpoint
) -> torch.Tensor:
    """Return the windows as int64 [number of windows, T]."""
    if not windows:
        raise CompressionError(f"distill: {what} is empty; give at least one window of {settings.window} token ids")
    lengths = {len(window) for window in windows}
    if lengths != {settings.window}:
        raise CompressionError(
            f"distill: {what} holds windows of {', '.join(map(str, sorted(lengths)[:3]))} tokens, but window is "
            f"{settings.window}; give windows of that length"
        )
    ids = torch.tensor([list(window) for window in windows])
    vocabulary = int(student.config["vocab_size"])
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise CompressionError(
            f"distill: {what} holds tokens {int(ids.min())} to {int(ids.max())}, and the models have {vocabulary}; "
            "use the models' own tokenizer"
        )
    return ids


def _require_apart(ids: torch.Tensor, held_out: torch.Tensor) -> None:
    trained = {row.numpy().tobytes() for row in ids}
    shared = sum(row.numpy().tobytes() in trained for row in held_out)
    if shared:
        raise CompressionError(
            f"distill: {shared} of {len(held_out)} held-out windows are trained on too; hold out other text"
        )


def _definition(
    settings: Distillation,
    student: Checkpoint,
    teacher: Checkpoint,
    ids: torch.Tensor,
    held_out: torch.Tensor,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Return everything that the result depends on, as JSON values."""
    values = dataclasses.asdict(settings)
    del values["save_every"]
    return {
        **values,
        "dtype": dtype,
        "device": device.partition(":")[0],
        "student": student.digest(),
        "teacher": teacher.digest(),
        "windows": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:32],
        "held_out": hashlib.sha256(held_out.numpy().tobytes()).hexdigest()[:32],
    }
