"""Order layers by the damage of removing them: the KL divergence of the predictions without each, measured one by one.

The search is greedy, as in LaCo and SLEB (https://arxiv.org/abs/2402.09025). The layer that is cheapest to remove
goes, then the next in what is left. With look-ahead, the layer goes whose removal leaves the cheapest next one, so that
layers that are redundant only together go together. Knows no plan: it orders the layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from compressors import cached
from compressors.device import batch_of
from compressors.files import alone
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family
from compressors.statistics.predictions import Predictions, spread
from compressors.typed_json import typed

WINDOWS, FEWEST = 5, 2  # of each domain of the calibration text, the most and the fewest
TOKENS = 15_360  # in all, unless FEWEST of each domain are more: long windows of many domains say no more
CANDIDATES = 10  # the number of cheapest layers of a step that the next one tries
AHEAD = 4  # the number of cheapest layers of a step that look-ahead follows
VERSION = 2  # kept orders of another version, or with other numbers of layers that are tried, are searched again

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Order:
    """Order is the state of a search.

    Attributes:
        removed: The layers of the base model in the order in which they go.
        kl: The KL divergence in nats per token after each removal.
        ranking: The layers that are left, the cheapest first as they were last tried; the next step tries its first
            CANDIDATES; None: all.
        each: The windows of each domain that it compares; None: none were compared yet.
    """

    removed: tuple[int, ...] = ()
    kl: tuple[float, ...] = ()
    ranking: tuple[int, ...] | None = None
    each: int | None = None


def order(
    base: Checkpoint,
    family: Family,
    domains: Mapping[str, Sequence[Sequence[int]]],
    count: int,
    directory: Path,
    device: str = "cpu",
    *,
    look_ahead: bool = False,
    batch: int | None = None,
    say: Say = lambda _: None,
) -> tuple[int, ...]:
    """Return the first `count` layers to remove.

    The search is kept in a file of `directory` after each step, and a later call resumes it. Greedy steps don't depend
    on how many follow, so all counts share a file. With look-ahead the last step differs, and each count has its own
    file.

    Args:
        base: The model.
        family: Its family.
        domains: The windows of token ids by domain; so many of each as `windows_of_each` says are taken, spread evenly.
        count: The number of layers to remove.
        directory: The directory of the file.
        device: The device that runs the model.
        look_ahead: Whether to choose by the cheapest next removal.
        batch: The number of windows that run at once; None: as many as the device takes well.
        say: A function that is called with what is being done.

    Raises:
        MachineError: When the file can't be written.
    """
    path = directory / (f"order-look-ahead-{count}.json" if look_ahead else "order.json")
    read = functools.partial(_read, layers=int(base.config["num_hidden_layers"]))
    state = cached.known(path, read) or Order()
    if len(state.removed) < count:
        with alone(path, lambda: say("leaving out layers: waiting for another process that does so")):
            state = cached.known(path, read, held=True) or Order()
            if len(state.removed) < count:
                say("leaving out layers: reading the model")
                each = state.each or windows_of_each(domains)
                state = dataclasses.replace(state, each=each)
                windows = [window for some in domains.values() for window in spread(some, each)]
                search = _Search(base, family, windows, device, batch or batch_of(device, max(map(len, windows))))
            while len(state.removed) < count:
                place = f"leaving out layer {len(state.removed) + 1} of {count}"
                ahead = look_ahead and len(state.removed) + 1 < count
                state = search.step(state, _saying(say, place), ahead)
                _keep(path, state)
    return state.removed[:count]


def windows_of_each(domains: Mapping[str, Sequence[Sequence[int]]]) -> int:
    """Return how many windows of each domain are compared: WINDOWS, or fewer where these are more than TOKENS."""
    length = max((len(window) for some in domains.values() for window in some), default=1)
    return max(FEWEST, min(WINDOWS, TOKENS // (max(len(domains), 1) * length)))


def _keep(path: Path, state: Order) -> None:
    values = dataclasses.asdict(state)
    cached.keep_json(path, {"rules": [VERSION, values.pop("each"), CANDIDATES, AHEAD], **values})


def _read(path: Path, layers: int) -> Order:
    """Return the order in a file; an empty one where the file has other rules. What it raises is what is wrong."""
    stored = cached.read_json(path)
    version, each, *tried = stored.pop("rules")
    if [version, *tried] != [VERSION, CANDIDATES, AHEAD]:
        return Order()
    state = typed(Order, {**stored, "each": each}, "order")  # it goes on with the windows that it began with
    left = [layer for layer in range(layers) if layer not in state.removed]
    if len({*state.removed}) != len(state.removed) or len(left) != layers - len(state.removed):
        raise ValueError(f"it removes layers {list(state.removed)} of {layers}")
    if len(state.kl) != len(state.removed) or (state.ranking is not None and sorted(state.ranking) != left):
        raise ValueError("its entries don't belong together")
    return state


def _saying(say: Say, where: str) -> Say:
    return lambda what: say(f"{where}: {what}")


class _Search(Predictions):
    """_Search leaves layers out by not calling them."""

    def step(self, state: Order, say: Say, look_ahead: bool) -> Order:
        """Remove one more layer; with `look_ahead`, the one that leaves the cheapest next one."""
        left = [layer for layer in range(self.layers.count) if layer not in state.removed]
        before = left if state.ranking is None else state.ranking
        costs = self.costs(left, left if state.ranking is None else before[:CANDIDATES], say)
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
        left_over = tuple(layer for layer in ranking if layer != gone)
        return Order((*state.removed, gone), (*state.kl, costs[gone]), left_over, state.each)

    def costs(self, left: Sequence[int], candidates: Sequence[int], say: Say) -> dict[int, float]:
        """Return the KL divergence in nats per token without each of `candidates`, among the layers `left`."""
        kl: dict[int, float] = {}
        hidden = self.start
        tried = [layer for layer in left if layer in candidates]
        for place, layer in enumerate(left):
            if layer in tried:
                say(f"trying {len(kl) + 1} of {len(tried)}")
                kl[layer] = self.kl(self.through(left[place + 1 :], hidden))
            if len(kl) == len(tried):
                break
            hidden = list(self.through([layer], hidden))
        return kl
