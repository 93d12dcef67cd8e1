"""Repair a cut model by a short distillation on the calibration text, on all weights at once.

Least squares holds on the kinds of text that it is fitted to. A student that learns the original's distributions on
text of all the kinds that the original knows keeps more on other text too. The original's own text is best for that
(`self` of `text.calibration`), as in LLM-QAT (https://arxiv.org/abs/2305.17888).
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from compressors.device import release
from compressors.distillation import distill
from compressors.distillation.settings import Distillation
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import FLOATS

VERSION = 4  # increase it when the same cut would be repaired differently
TOKENS, TOKENS_ON_GPU = 262_144, 1_048_576  # a GPU takes a minute or two for four times as many
BATCH_TOKENS = 2048  # few, so that so few tokens are 128 updates
EVALUATIONS = 4
RATES = (1e-3, 3e-3)  # learning rates over the typical weight, the lowest first: models differ in what they bear
TRIED, SHARE_TRIED = 32_768, 8  # tokens that try a rate, or so small a part of all where they are few
JUDGES, MOST_JUDGES = 8, 48  # one of so many windows of each text judges, at most so many, and is not trained on

Windows = Mapping[str, Sequence[Sequence[int]]]


def repaired(
    cut: Checkpoint, base: Checkpoint, windows: Windows, device: str, work: Path, say: Callable[[str], None]
) -> dict[str, torch.Tensor]:
    """Return the weights of `cut` after the distillation, by name, on the CPU and in their dtypes.

    They are the cut model's own where no evaluation was better than before. The learning rate is the one of RATES that
    a short training with it from the same start wins more by.

    Args:
        cut: The cut checkpoint, unquantized, or with integers in memory (`Checkpoint.values`) whose scales learn.
        base: The base model's checkpoint.
        windows: The windows of token ids by text, all of one length.
        device: The device that both models run on.
        work: A directory for the state, from which a killed call goes on; it is removed at the end.
        say: Told what is done.

    Raises:
        CheckpointError: The models can't be distilled, or `work` can't be written.
        CompressionError: The device has no memory left, or the loss is not finite.
    """
    trained, judged = parted(windows)
    total = tokens_on(device)
    with torch.inference_mode(False), torch.enable_grad():  # whoever reads the weights may have switched gradients off
        student = _in_memory(cut)

        def learn(how: Distillation) -> distill.Distilled:
            trying = how.tokens < total
            what = f" a rate of {how.learning_rate:g} tried," if trying else ""

            def progress(step: distill.Progress) -> None:
                say(f"repair: distilling,{what} {step.stage}, {step.tokens} of {step.total_tokens} tokens")

            release(device)  # the models of the training before refer to themselves
            directory = work / f"{how.tokens}-{how.learning_rate:g}"
            return distill.distill(
                student, base, trained, judged, how, device, directory, progress, keep_best=not trying
            )

        made = _at_the_best_rate(settings(student, len(trained[0]), len(judged), total), learn).checkpoint
        weights = {name: made.tensors[name].load() for name in names(cut)}
    shutil.rmtree(work, ignore_errors=True)
    return weights


def _at_the_best_rate(how: Distillation, learn: Callable[[Distillation], distill.Distilled]) -> distill.Distilled:
    """Learn with each of RATES for a short time, then with the one that lost least; `how` has the lowest one."""
    lowest, *others = (_rounded(how.learning_rate * rate / RATES[0]) for rate in RATES)
    best = lowest
    tokens = max(min(TRIED, how.tokens // SHARE_TRIED), how.batch * how.window)
    if others and tokens < how.tokens:
        tried = dataclasses.replace(how, tokens=tokens, evaluate_every=tokens)

        def lost(rate: float) -> float:
            try:
                return learn(dataclasses.replace(tried, learning_rate=rate)).kl_best
            except distill.Diverged:
                return math.inf

        best = min((lowest, *others), key=lost)
    try:
        return learn(dataclasses.replace(how, learning_rate=best))
    except distill.Diverged:
        if best == lowest:
            raise
    return learn(dataclasses.replace(how, learning_rate=lowest))


def _rounded(rate: float) -> float:
    """Return the rate in three digits: sums over weights differ in their last ones, and a killed call goes on."""
    return float(f"{rate:.3g}")


def names(cut: Checkpoint) -> list[str]:
    """Return the names of the weights that a distillation changes: all that are no integers."""
    return [name for name, tensor in cut.tensors.items() if tensor.dtype in FLOATS]


def parted(windows: Windows) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Return the windows to train on and those that judge.

    Every JUDGES-th of each text judges, or fewer where they are more than MOST_JUDGES; of a short text the last one.
    """
    apart = max(JUDGES, -(-sum(map(len, windows.values())) // MOST_JUDGES))
    trained: list[Sequence[int]] = []
    judged: list[Sequence[int]] = []
    for some in windows.values():
        every = min(apart, len(some))
        for place, window in enumerate(some, start=1):
            (judged if place % every == 0 and len(some) > 1 else trained).append(window)
    return trained, judged or trained[-1:]


def tokens_on(device: str) -> int:
    """Return how many tokens a distillation on a device takes."""
    return TOKENS_ON_GPU if device.startswith("cuda") else TOKENS


def settings(cut: Checkpoint, length: int, judges: int, tokens: int) -> Distillation:
    """Return the settings of a distillation with so many tokens on windows of `length`, `judges` of which judge.

    The learning rate is the lowest of RATES. Adam moves each weight by about the learning rate in an update, whatever
    its gradient, so the rate follows the size of the weights, as the relative steps of Adafactor do
    (https://arxiv.org/abs/1804.04235, section 8).
    """
    return Distillation(
        tokens=tokens,
        batch_tokens=max(BATCH_TOKENS, length),
        window=length,
        learning_rate=_rounded(RATES[0] * typical_weight(cut)),
        evaluate_every=tokens // EVALUATIONS,
        held_out_windows=judges,
        compiled=False,  # it would take longer than all the rest
    )


def typical_weight(checkpoint: Checkpoint) -> float:
    """Return the median over matrices of the root mean square of their weights: .19 for SmolLM2, .016 for Qwen2.5.

    Where weights are integers it is that of their scales.
    """
    matrices = [tensor for tensor in map(checkpoint.tensors.__getitem__, names(checkpoint)) if len(tensor.shape) == 2]
    return statistics.median(
        float(torch.linalg.vector_norm(tensor.load(), dtype=torch.float32)) / math.sqrt(math.prod(tensor.shape))
        for tensor in matrices
    )


def _in_memory(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with its tensors loaded once."""
    return dataclasses.replace(checkpoint, tensors={name: one.loaded() for name, one in checkpoint.tensors.items()})
