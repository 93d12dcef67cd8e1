"""Train a student: batches, evaluations and saved states, until the distillation ends.

Inputs are not checked here: see `distill`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compressors.distillation import fit as distill_fit
from compressors.distillation import pair as distill_pair
from compressors.distillation import state as distill_state
from compressors.distillation.pair import Pair
from compressors.distillation.settings import Distillation, batch_of, learning_rate
from compressors.distillation.state import Evaluation, Standing
from compressors.errors import CheckpointError, CompressionError, first_line
from compressors.model.checkpoint import Checkpoint

MOST_BAD = 3  # the number of batches in a row without a finite loss and gradient that ends the training
OUT_OF_TOKENS, NO_IMPROVEMENT, NOT_FINITE = "tokens", "no improvement", "not finite"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress is what a caller is told during a distillation.

    Attributes:
        stage: The stage: "loading", "training", "evaluating" or "saving".
        tokens: The tokens trained on, those before a kill included.
        total_tokens: The tokens to train on in all.
        tokens_per_second: The speed of training in this call.
        loss: The moving mean of the loss, in nats per token.
        held_out_kl: The last held-out KL divergence, in nats per token.
        best_kl: The lowest one so far.
        seconds_left: The seconds until all tokens are seen at this call's speed, evaluations and saving included;
            training may end earlier.
    """

    stage: str
    tokens: int
    total_tokens: int
    tokens_per_second: float | None
    loss: float | None
    held_out_kl: float | None
    best_kl: float | None
    seconds_left: float | None


class Report:
    """Report tells a caller the progress, from the start of this call and of its training and the standings since."""

    def __init__(self, progress: Callable[[Progress], None], settings: Distillation) -> None:
        """Start the clock of this call."""
        self.progress, self.settings = progress, settings
        self.began = self.training_began = time.monotonic()
        self.first: Standing | None = None
        self.last: Standing | None = None

    def begin(self, standing: Standing | None) -> None:
        """Set the standing at the start of this call."""
        self.first = self.last = standing

    @property
    def seconds(self) -> float:
        """Return the seconds of all calls together."""
        return (self.first.seconds if self.first else 0.0) + time.monotonic() - self.began

    def at(self, standing: Standing) -> Standing:
        """Set the present standing, and return it."""
        self.last = standing
        return standing

    def __call__(self, stage: str) -> None:
        """Tell the caller the progress in this stage."""
        first, last, settings = self.first, self.last, self.settings
        of_batch = settings.batch * settings.window
        steps = (last.step if last else 0) - (first.step if first else 0)
        training = (last.training_seconds if last else 0.0) - (first.training_seconds if first else 0.0)
        evaluations = last.evaluations if last else ()
        pace = (time.monotonic() - self.training_began) / steps if steps else None
        self.progress(
            Progress(
                stage=stage,
                tokens=last.step * of_batch if last else 0,
                total_tokens=settings.steps * of_batch,
                tokens_per_second=steps * of_batch / training if steps else None,
                loss=last.loss if last else None,
                held_out_kl=evaluations[-1].held_out_kl if evaluations else None,
                best_kl=best_kl(last) if last and evaluations else None,
                seconds_left=pace * (settings.steps - last.step) if pace is not None and last else None,
            )
        )


def train(
    pair: Pair,
    student: Checkpoint,
    ids: torch.Tensor,
    held_out: torch.Tensor,
    settings: Distillation,
    definition: Mapping[str, Any],
    work: Path,
    report: Report,
    standing: Standing | None,
    keep_best: bool,
) -> Standing:
    """Train from `standing` to the end of the distillation, and return the standing there.

    Args:
        pair: Both models.
        student: The student's checkpoint.
        ids: The windows to train on, int64 [n, T], in main memory.
        held_out: The held-out windows, int64 [N, T], in main memory.
        settings: The settings.
        definition: What the result depends on, for the saved state.
        work: The directory of the saved state.
        report: The report to keep up to date.
        standing: The saved standing to resume from; None: start.
        keep_best: Whether the best student is saved.

    Raises:
        CheckpointError: When a model can't be distilled, or the state can't be read or written.
        CompressionError: When torch.compile was asked for and fails.
    """
    distill_pair.require_plain_logits(pair, held_out[0])
    optimizer = distill_pair.optimizer_of(pair, settings.weight_decay)
    standing = report.at(_begin(pair, optimizer, ids, settings, work, standing))
    better: dict[str, torch.Tensor] | None = None  # the best student, until it is saved
    if not standing.evaluations:
        standing, _ = _evaluate(pair, held_out, settings, standing, report)
        _require_finite(standing)
    distill_state.prepare(work)
    every = max(round(settings.evaluate_every / (settings.batch * settings.window)), 1)
    saved = time.monotonic()
    report.training_began = time.monotonic()
    while standing.ended is None:
        standing = _batch(pair, optimizer, ids, settings, standing, report)
        if standing.ended is None:
            if standing.step % every and standing.step < settings.steps:
                continue
            standing, improved = _evaluate(pair, held_out, settings, standing, report)
            if improved and keep_best:
                better = {
                    name: master.detach().to("cpu", student.tensors[name].dtype, copy=True)
                    for name, master in pair.masters.items()
                }
            if standing.ended is None and time.monotonic() - saved < settings.save_every:
                continue
        weights = None if standing.ended else distill_pair.to_tensors(pair, optimizer)
        standing = report.at(dataclasses.replace(standing, seconds=report.seconds))
        tick = functools.partial(report, "saving")
        standing = report.at(distill_state.save(work, definition, standing, weights, better, tick))
        better, saved = None, time.monotonic()
    return standing


def _begin(
    pair: Pair,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    settings: Distillation,
    work: Path,
    standing: Standing | None,
) -> Standing:
    """Fit a new training to the device, or load the weights of a saved one; then prepare the layers."""
    if standing is None:
        micro, twice = distill_fit.fit(
            pair, ids[0], settings.batch, settings.chunk, settings.gradient_checkpointing, settings.micro_batch
        )
        standing = Standing(micro_batch=micro, gradient_checkpointing=twice)
    else:
        _resume(pair, optimizer, work, standing)
    compiled = _prepare_layers(pair, optimizer, ids[: standing.micro_batch], settings, standing.gradient_checkpointing)
    return dataclasses.replace(standing, compiled=compiled)


def _require_finite(standing: Standing) -> None:
    if not math.isfinite(standing.evaluations[0].held_out_kl):
        raise CheckpointError(
            f"distill: the held-out KL is {standing.evaluations[0].held_out_kl} before training; the student or the "
            "teacher is broken, build it again"
        )


def _resume(pair: Pair, optimizer: torch.optim.Optimizer, work: Path, standing: Standing) -> None:
    try:
        saved = distill_state.tensors(work, str(standing.weights))
        distill_pair.from_tensors(pair, optimizer, {name: lazy.load for name, lazy in saved.items()}, standing.updates)
    except (KeyError, RuntimeError) as error:
        raise distill_state.unreadable(work, str(standing.weights), error) from None


def _prepare_layers(
    pair: Pair, optimizer: torch.optim.Optimizer, ids: torch.Tensor, settings: Distillation, twice: bool
) -> bool:
    """Compile the layers where wanted, by one pass forward and backward without an update; return whether they are."""
    compiled = pair.device.startswith("cuda") if settings.compiled is None else settings.compiled
    distill_fit.set_layers(pair, twice=twice, compiled=compiled)
    if not compiled:
        return False
    try:
        distill_pair.backward(pair, ids.to(pair.device), 1.0, settings.temperature, settings.weight_ce, settings.chunk)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers that lack a tool raise errors of many types
        if settings.compiled:
            raise CompressionError(
                f"distill: torch.compile fails here ({first_line(error)}); set compiled to false"
            ) from None
        distill_fit.set_layers(pair, twice=twice, compiled=False)
        compiled = False
    optimizer.zero_grad(set_to_none=True)
    return compiled


def _batch(
    pair: Pair,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    settings: Distillation,
    standing: Standing,
    report: Report,
) -> Standing:
    """Take a batch and update the weights if its loss and gradient are finite; return the new standing."""
    began = time.monotonic()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(standing.step, settings)
    batch = ids[batch_of(standing.step, settings.batch, len(ids), settings.seed)]  # (windows, T)
    loss = 0.0
    for some in torch.split(batch, standing.micro_batch):
        share = len(some) / len(batch)
        some = some.to(pair.device)
        loss += share * distill_pair.backward(
            pair, some, share, settings.temperature, settings.weight_ce, settings.chunk
        )
        report("training")
    if math.isfinite(loss):
        changed = distill_pair.update(pair, optimizer, settings.grad_clip)
    else:
        optimizer.zero_grad(set_to_none=True)
        changed = False
    moving, recent = standing.loss, standing.recent
    if math.isfinite(loss):
        moving = loss if moving is None else 0.9 * moving + 0.1 * loss
        recent = (recent[0] + loss, recent[1] + 1)
    bad = 0 if changed else standing.bad + 1
    return report.at(
        dataclasses.replace(
            standing,
            step=standing.step + 1,
            updates=standing.updates + changed,
            bad=bad,
            loss=moving,
            recent=recent,
            training_seconds=standing.training_seconds + time.monotonic() - began,
            ended=NOT_FINITE if bad == MOST_BAD else None,
        )
    )


def _evaluate(
    pair: Pair, held_out: torch.Tensor, settings: Distillation, standing: Standing, report: Report
) -> tuple[Standing, bool]:
    """Return (the standing after an evaluation, whether it was the best so far)."""
    report("evaluating")
    together = distill_fit.divisor(len(held_out), standing.micro_batch)
    kl = distill_pair.held_out_kl(pair, held_out, together, settings.chunk, functools.partial(report, "evaluating"))
    improved = bool(standing.evaluations) and kl < best_kl(standing)
    total, number = standing.recent
    tokens = standing.step * settings.batch * settings.window
    evaluations = (*standing.evaluations, Evaluation(tokens, kl, total / number if number else None))
    standing = dataclasses.replace(standing, evaluations=evaluations, recent=(0.0, 0))
    by_kl = [evaluation.held_out_kl for evaluation in evaluations]
    ended = None
    if len(by_kl) - 1 - by_kl.index(best_kl(standing)) >= settings.patience:
        ended = NO_IMPROVEMENT
    if standing.step == settings.steps:
        ended = OUT_OF_TOKENS
    return report.at(dataclasses.replace(standing, ended=ended)), improved


def best_kl(standing: Standing) -> float:
    """Return the lowest held-out KL divergence, including the one before training."""
    return min(evaluation.held_out_kl for evaluation in standing.evaluations if not math.isnan(evaluation.held_out_kl))
