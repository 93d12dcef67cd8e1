"""Which layers do the least damage when they go: measured one by one, by the KL divergence of what is predicted then.

Greedy: the layer goes whose removal is the cheapest, then the next in what is left, as in LaCo's and SLEB's searches
(SLEB, https://arxiv.org/abs/2402.09025). With look-ahead, the one goes whose removal leaves the cheapest next one:
layers that are redundant only together are not torn apart. Knows no plan: it orders the layers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from compressors.errors import CheckpointError
from compressors.files import alone, write_json
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family
from compressors.statistics.predictions import Predictions, spread

WINDOWS = 5  # of each domain of the calibration text
CANDIDATES = 10  # the cheapest of a step are tried in the next
AHEAD = 4  # the cheapest of a step that look-ahead follows
RULES = [2, WINDOWS, CANDIDATES, AHEAD]  # what an order that was kept must have been found by

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Order:
    """removed: layers of the base model in the order in which they go. kl: nats per token after each. ranking: those
    that are left, the cheapest first as they were last tried: the next step tries its first CANDIDATES; None: all.
    """

    removed: tuple[int, ...] = ()
    kl: tuple[float, ...] = ()
    ranking: tuple[int, ...] | None = None


def order(
    base: Checkpoint,
    family: Family,
    domains: Mapping[str, Sequence[Sequence[int]]],
    count: int,
    directory: Path,
    device: str = "cpu",
    *,
    look_ahead: bool = False,
    batch: int = 4,
    say: Say = lambda _: None,
) -> tuple[int, ...]:
    """The first `count` layers that go. Kept in a file of `directory` after each step, from which a later call goes on.

    domains: windows of token ids, of which WINDOWS of each are taken, spread evenly. Greedy steps don't depend on how
    many follow, so that all counts share a file; with look-ahead the last step is another, and each count has its own.
    Raises CheckpointError for a file that can't be read.
    """
    path = directory / (f"order-look-ahead-{count}.json" if look_ahead else "order.json")
    found = _read(path)
    if len(found.removed) < count:
        with alone(path, lambda: say("leaving out layers: waiting for another process that does so")):
            found = _read(path)
            if len(found.removed) < count:
                say("leaving out layers: reading the model")
                windows = [window for those in domains.values() for window in spread(those, WINDOWS)]
                search = _Search(base, family, windows, device, batch)
            while len(found.removed) < count:
                place = f"leaving out layer {len(found.removed) + 1} of {count}"
                ahead = look_ahead and len(found.removed) + 1 < count
                found = search.step(found, _saying(say, place), ahead)
                write_json(path, {"rules": RULES, **dataclasses.asdict(found)})
    return found.removed[:count]


def _read(path: Path) -> Order:
    if not path.is_file():
        return Order()
    try:
        stored = json.loads(path.read_text())
        if stored.pop("rules") != RULES:
            return Order()
        ranking = stored["ranking"]
        return Order(tuple(stored["removed"]), tuple(stored["kl"]), None if ranking is None else tuple(ranking))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"layer order {path}: can't be read ({error}); delete it, it is made again") from None


def _saying(say: Say, where: str) -> Say:
    return lambda what: say(f"{where}: {what}")


class _Search(Predictions):
    """Layers are left out by not calling them."""

    def step(self, there: Order, say: Say, look_ahead: bool) -> Order:
        """One layer more. look_ahead: the one that leaves the cheapest next one."""
        left = [layer for layer in range(self.layers.count) if layer not in there.removed]
        before = left if there.ranking is None else there.ranking
        costs = self.costs(left, left if there.ranking is None else before[:CANDIDATES], say)
        cheapest = sorted(costs, key=lambda layer: (costs[layer], layer))
        gone = cheapest[0]
        ranking = [*cheapest, *(layer for layer in before if layer not in costs)]
        if look_ahead and len(left) > 2:
            after = {}
            for first in cheapest[:AHEAD]:
                rest = [layer for layer in left if layer != first]
                nexts = [layer for layer in ranking if layer != first][:CANDIDATES]
                after[first] = min(self.costs(rest, nexts, _saying(say, f"{first} and one more")).values())
            gone = min(after, key=lambda first: (after[first], first))
        return Order(
            (*there.removed, gone),
            (*there.kl, costs[gone]),
            tuple(layer for layer in ranking if layer != gone),
        )

    def costs(self, left: Sequence[int], candidates: Sequence[int], say: Say) -> dict[int, float]:
        """Layer → KL in nats per token without it; of those that are `left`, the `candidates`."""
        found: dict[int, float] = {}
        hidden = self.start
        tried = [layer for layer in left if layer in candidates]
        for place, layer in enumerate(left):
            if layer in tried:
                say(f"trying {len(found) + 1} of {len(tried)}")
                found[layer] = self.kl(self.through(left[place + 1 :], hidden))
            if len(found) == len(tried):
                break
            hidden = list(self.through([layer], hidden))
        return found
