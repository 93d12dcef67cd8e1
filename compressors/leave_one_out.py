"""Which layers do the least damage when they go: measured one by one, by the KL divergence of what is predicted then.

Greedy: the layer goes whose removal is the cheapest, then the next in what is left, as in LaCo's and SLEB's searches
(SLEB, https://arxiv.org/abs/2402.09025). With look-ahead, the one goes whose removal leaves the cheapest next one:
layers that are redundant only together are not torn apart. Knows no plan: it orders the layers.

Symbols: B windows of a batch, T tokens of a window, E hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from compressors.checkpoint import Checkpoint
from compressors.errors import CheckpointError
from compressors.family import Family
from compressors.layerwise import Layers

WINDOWS = 5  # of each domain of the calibration text
CANDIDATES = 10  # the cheapest of a step are tried in the next
AHEAD = 4  # the cheapest of a step that look-ahead follows
CHUNK = 128  # tokens whose logits are held at a time


@dataclasses.dataclass(frozen=True)
class Order:
    """removed: layers of the base model in the order in which they go. kl: nats per token after each."""

    removed: tuple[int, ...]
    kl: tuple[float, ...]


def order(
    base: Checkpoint,
    family: Family,
    windows: Sequence[Sequence[int]],
    count: int,
    path: Path,
    device: str = "cpu",
    *,
    look_ahead: bool = False,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Order:
    """The first `count` layers that go, from the file `path` as far as it has them, and written there.

    Raises CheckpointError for a file that can't be read.
    """
    there = _read(path)
    if len(there.removed) < count:
        search = _Search(base, family, windows, device, batch)
        there = search.extended(there, count, look_ahead, progress)
        _write(path, there)
    return Order(there.removed[:count], there.kl[:count])


def _read(path: Path) -> Order:
    if not path.is_file():
        return Order((), ())
    try:
        stored = json.loads(path.read_text())
        return Order(tuple(stored["removed"]), tuple(stored["kl"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"layer order {path}: can't be read ({error}); delete it, it is made again") from None


def _write(path: Path, made: Order) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as out:
        json.dump(dataclasses.asdict(made), out)
    Path(out.name).replace(path)


class _Search:
    """The base model with its predictions; layers are left out by not calling them."""

    def __init__(
        self, base: Checkpoint, family: Family, windows: Sequence[Sequence[int]], device: str, batch: int
    ) -> None:
        model = base.to_model(device, dtype=torch.float32 if device == "cpu" else None)
        self.layers = Layers(model, family, windows, batch)
        self.norm, self.head = self.layers.modules[family.final_norm], model.get_output_embeddings()
        self.start = list(self.layers.hidden)
        self.base = [
            [logits.log_softmax(-1).half().cpu() for logits in self._logits(hidden)]
            for hidden in self._through(range(self.layers.count), self.start)
        ]

    def extended(
        self, there: Order, count: int, look_ahead: bool, progress: Callable[[int, int], None] | None
    ) -> Order:
        removed, kls = list(there.removed), list(there.kl)
        candidates: list[int] | None = None
        while len(removed) < count:
            left = [layer for layer in range(self.layers.count) if layer not in removed]
            costs = self.costs(left, candidates, progress)
            ranked = sorted(costs, key=lambda layer: (costs[layer], layer))
            gone = ranked[0]
            if look_ahead and len(removed) + 1 < count and len(left) > 2:
                after = {
                    first: min(
                        self.costs([one for one in left if one != first], ranked[:CANDIDATES], progress).values()
                    )
                    for first in ranked[:AHEAD]
                }
                gone = min(after, key=lambda first: (after[first], first))
            removed.append(gone)
            kls.append(costs[gone])
            candidates = [layer for layer in ranked if layer != gone][:CANDIDATES]
        return Order(tuple(removed), tuple(kls))

    def costs(
        self, left: Sequence[int], candidates: Sequence[int] | None, progress: Callable[[int, int], None] | None
    ) -> dict[int, float]:
        """Layer → KL in nats per token without it; of those that are `left`, the `candidates` (None: all)."""
        found = {}
        hidden = self.start
        tried = [layer for layer in left if candidates is None or layer in candidates]
        for place, layer in enumerate(left):
            if layer in tried:
                found[layer] = self.kl(self._through(left[place + 1 :], hidden))
                if progress is not None:
                    progress(len(found), len(tried))
            if len(found) == len(tried):
                break
            hidden = list(self._through([layer], hidden))
        return found

    def _through(self, those: Sequence[int], hidden: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """What comes out of these layers, batch by batch [B, T, E]."""
        for place, of_batch in enumerate(hidden):
            self.layers.hidden[place] = of_batch
            for layer in those:
                out, _ = self.layers.run(layer, place)
                self.layers.hidden[place] = out
            yield self.layers.hidden[place].cpu()

    def kl(self, hidden: Iterator[torch.Tensor]) -> float:
        """Of the base model's predictions from those made of the last layer's output."""
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
        for part in self.norm(hidden.to(self.layers.model.device)).flatten(0, 1).split(CHUNK):
            yield self.head(part).float()
