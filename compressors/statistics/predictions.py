"""Compare a model's predictions with those it makes when parts of it are left out.

Symbols: B windows of a batch, T tokens of a window, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from compressors.device import compute_dtype, home
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family
from compressors.statistics.layerwise import Layers

CHUNK, CHUNK_ON_GPU = 128, 1024  # tokens whose logits are held at a time


def spread(windows: Sequence[Sequence[int]], count: int) -> Sequence[Sequence[int]]:
    """Return at most `count` of the windows, at equal steps from the first."""
    return windows[:: max(1, len(windows) // count)][:count]


class Predictions:
    """Predictions holds a model in memory with its predictions on some windows.

    Attributes:
        every: The step between compared positions: the last of each `every` tokens counts, since the vocabulary costs
            as much as many layers.
        start: The input [B, T, E] of the first layer, per batch.
        base: The log-probabilities of the whole model, float16 [tokens, V], by batch and chunk.
    """

    def __init__(
        self,
        base: Checkpoint,
        family: Family,
        windows: Sequence[Sequence[int]],
        device: str,
        batch: int,
        every: int = 1,
    ) -> None:
        """Load `base` on `device` and predict the windows, `batch` at once."""
        self.every = every
        model = base.to_model(device, dtype=compute_dtype(device))
        self.layers = Layers(model, family, windows, batch)
        self.norm, self.head = self.layers.modules[family.final_norm], model.get_output_embeddings()
        self.start = list(self.layers.hidden)
        tokens = sum(map(len, windows)) // every
        kept_at = home(device, 2 * tokens * int(model.config.vocab_size))
        self.base = [
            [logits.log_softmax(-1).half().to(kept_at) for logits in self._logits(hidden)]
            for hidden in self.through(range(self.layers.count), self.start)
        ]

    def through(self, those: Sequence[int], hidden: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield what the layers `those` make of `hidden`, [B, T, E] per batch."""
        for place, of_batch in enumerate(hidden):
            self.layers.hidden[place] = of_batch
            for layer in those:
                out, _ = self.layers.run(layer, place)
                self.layers.hidden[place] = out
            yield self.layers.hidden[place].to(self.layers.home)

    def kl(self, hidden: Iterator[torch.Tensor]) -> float:
        """Return the KL divergence of the whole model from predictions on `hidden`, in nats per compared token.

        Args:
            hidden: The outputs [B, T, E] of a last layer, per batch.
        """
        total, tokens = 0.0, 0
        for of_batch, known in zip(hidden, self.base, strict=True):
            for logits, base in zip(self._logits(of_batch), known, strict=True):
                base = base.to(logits.device).float().log_softmax(-1)
                total += float((base.exp() * (base - logits.log_softmax(-1))).sum(-1).sum(dtype=torch.float64))
                tokens += len(base)
        return total / tokens

    @torch.inference_mode()
    def _logits(self, hidden: torch.Tensor) -> Iterator[Any]:
        """Yield the logits float32 [tokens, V] of the compared positions."""
        looked_at = hidden[:, self.every - 1 :: self.every].to(self.layers.model.device)
        for part in self.norm(looked_at).flatten(0, 1).split(CHUNK_ON_GPU if looked_at.is_cuda else CHUNK):
            yield self.head(part).float()
