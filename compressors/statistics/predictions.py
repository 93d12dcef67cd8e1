"""What a model predicts, and how far from it what it predicts when parts of it are left out.

Symbols: B windows of a batch, T tokens of a window, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from compressors.device import compute_dtype
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family
from compressors.statistics.layerwise import Layers

CHUNK = 128  # tokens whose logits are held at a time


def spread(windows: Sequence[Sequence[int]], count: int) -> Sequence[Sequence[int]]:
    """So many of them at most, at equal steps from the first."""
    return windows[:: max(1, len(windows) // count)][:count]


def _home(device: str, needed: int) -> str:
    """Where so many bytes wait that are read again and again: on the device, where they take a quarter of its free
    memory at most, or else in main memory.
    """
    return device if device == "cuda" and needed < torch.cuda.mem_get_info()[0] / 4 else "cpu"


class Predictions:
    """A model in memory with what it predicts of some windows.

    every: of so many tokens one's prediction is looked at, the last; the vocabulary costs as much as many layers.
    start: what goes into its first layer, batch by batch [B, T, E].
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
        self.every = every
        model = base.to_model(device, dtype=compute_dtype(device))
        self.layers = Layers(model, family, windows, batch)
        self.norm, self.head = self.layers.modules[family.final_norm], model.get_output_embeddings()
        self.start = list(self.layers.hidden)
        tokens = sum(map(len, windows)) // every
        home = _home(device, 2 * tokens * int(model.config.vocab_size))
        self.base = [
            [logits.log_softmax(-1).half().to(home) for logits in self._logits(hidden)]
            for hidden in self.through(range(self.layers.count), self.start)
        ]

    def through(self, those: Sequence[int], hidden: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """What comes out of these layers, batch by batch [B, T, E]."""
        for place, of_batch in enumerate(hidden):
            self.layers.hidden[place] = of_batch
            for layer in those:
                out, _ = self.layers.run(layer, place)
                self.layers.hidden[place] = out
            yield self.layers.hidden[place].cpu()

    def kl(self, hidden: Iterator[torch.Tensor]) -> float:
        """Of the whole model's predictions from those made of a last layer's output, nats per token that is looked
        at.
        """
        total, tokens = 0.0, 0
        for of_batch, known in zip(hidden, self.base, strict=True):
            for logits, base in zip(self._logits(of_batch), known, strict=True):
                base = base.to(logits.device).float().log_softmax(-1)
                total += float((base.exp() * (base - logits.log_softmax(-1))).sum(dtype=torch.float64))
                tokens += len(base)
        return total / tokens

    @torch.inference_mode()
    def _logits(self, hidden: torch.Tensor) -> Iterator[Any]:
        """float32 [≤ CHUNK, V]."""
        looked_at = hidden[:, self.every - 1 :: self.every].to(self.layers.model.device)
        for part in self.norm(looked_at).flatten(0, 1).split(CHUNK):
            yield self.head(part).float()
