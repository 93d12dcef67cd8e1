"""Define the settings of a distillation, and derive its schedule and the order of its windows.

Knows no model and no text.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math

import torch

from compressors.errors import CompressionError

COMPUTED_IN = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Distillation holds the settings of a distillation.

    Attributes:
        tokens: The number of tokens to train on in all.
        batch_tokens: The tokens of an update, rounded down to whole windows.
        window: The tokens of a window.
        learning_rate: The highest learning rate.
        warmup_share: The share of the updates in which the learning rate rises; then it falls to 0 along a cosine.
        temperature: The temperature of the KL divergence, which is multiplied by temperature².
        weight_ce: The weight of the cross-entropy with the true next token.
        weight_decay: The weight decay of matrices; embeddings, norms and biases have none.
        grad_clip: The largest norm of the gradient.
        evaluate_every: The number of tokens between evaluations.
        patience: The number of evaluations in a row without improvement that end the training.
        seed: The random seed of the order of windows.
        gradient_checkpointing: Whether to compute activations twice instead of keeping them; None: where memory
            requires it.
        held_out_windows: The number of held-out windows to evaluate on, from the first.
        chunk: The number of positions whose logits are held at once.
        micro_batch: The number of windows that run at once; None: as memory allows.
        dtype: The dtype to compute in, "bfloat16" or "float32"; None: bfloat16 on CUDA, else float32.
        compiled: Whether torch.compile fuses each layer; None: on CUDA, where it works.
        save_every: The seconds between saved states, at evaluations; it does not change the result.
    """

    tokens: int
    batch_tokens: int = 32_768
    window: int = 1024
    learning_rate: float = 1e-4
    warmup_share: float = 0.05
    temperature: float = 1.0
    weight_ce: float = 0.0
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    evaluate_every: int = 524_288
    patience: int = 4
    seed: int = 0
    gradient_checkpointing: bool | None = None
    held_out_windows: int = 32
    chunk: int = 2048
    micro_batch: int | None = None
    dtype: str | None = None
    compiled: bool | None = None
    save_every: float = 120.0

    @property
    def batch(self) -> int:
        """Return the number of windows of an update."""
        return self.batch_tokens // self.window

    @property
    def steps(self) -> int:
        """Return the number of updates in all."""
        return math.ceil(self.tokens / (self.batch * self.window))


def require_valid(settings: Distillation) -> None:
    """Check every setting.

    Raises:
        CompressionError: For the first setting that is out of range; one line.
    """
    rules = {
        "tokens": (settings.tokens >= 1, "must be 1 or more"),
        "window": (settings.window >= 2, "must be 2 tokens or more: the first predicts the next"),
        "batch_tokens": (settings.batch_tokens >= settings.window, f"must hold a window of {settings.window}"),
        "learning_rate": (0 < settings.learning_rate < math.inf, "must be a number above 0"),
        "warmup_share": (0 <= settings.warmup_share < 1, "must be from 0 to below 1"),
        "temperature": (0 < settings.temperature < math.inf, "must be a number above 0"),
        "weight_ce": (0 <= settings.weight_ce < math.inf, "must be a number of 0 or more"),
        "weight_decay": (0 <= settings.weight_decay < math.inf, "must be a number of 0 or more"),
        "grad_clip": (settings.grad_clip > 0, "must be above 0"),
        "evaluate_every": (settings.evaluate_every >= 1, "must be 1 token or more"),
        "patience": (settings.patience >= 1, "must be 1 or more"),
        "held_out_windows": (settings.held_out_windows >= 1, "must be 1 or more"),
        "chunk": (settings.chunk >= 1, "must be 1 or more"),
        "micro_batch": (settings.micro_batch is None or settings.micro_batch >= 1, "must be 1 or more"),
        "dtype": (settings.dtype in (None, *COMPUTED_IN), f"must be {' or '.join(COMPUTED_IN)}"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise CompressionError(f"distill: {name} is {getattr(settings, name)!r}, but {rule}")


def learning_rate(step: int, settings: Distillation) -> float:
    """Return the learning rate of update number `step` (from 0): a linear rise, then a cosine that ends near 0."""
    steps = settings.steps
    warmup = min(round(settings.warmup_share * steps), steps - 1)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def batch_of(step: int, batch: int, windows: int, seed: int) -> list[int]:
    """Return the numbers of the windows of update `step`.

    All `windows` are taken in an order drawn from the seed, then in another order, and so on.
    """
    numbers = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(place, windows)
        numbers.append(_order(epoch, windows, seed)[index])
    return numbers


@functools.lru_cache(maxsize=4)
def _order(epoch: int, windows: int, seed: int) -> tuple[int, ...]:
    key = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:6])
    return tuple(torch.randperm(windows, generator=torch.Generator().manual_seed(key)).tolist())
