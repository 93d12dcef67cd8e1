"""Which key/value groups of each layer do the least damage when they go together with those of all other layers, by the
KL divergence of what is predicted then.

Coordinate descent: from the groups that add the least to their layer's output (`methods.importance.energy`), layer
after layer, those that are the cheapest to leave out while the other layers go without theirs; SWEEPS times through the
model. What the absence of one does depends on which others are absent: chosen each by itself, by the KL of leaving it
out of the whole model, SmolLM2's groups were worse than by energy (benchmarks/README.md). Knows no plan.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compressors.device import release
from compressors.errors import CheckpointError
from compressors.files import alone, write_json
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family, head_dim
from compressors.statistics.predictions import Predictions, spread

WINDOWS = 16  # of each domain of the calibration text
CANDIDATES = 4  # for each group that goes, so many of the least energy are tried
SWEEPS = 2
EVERY = 4  # tokens, of which one's prediction is looked at
RULES = [2, WINDOWS, CANDIDATES, SWEEPS, EVERY]  # what a choice that was kept must have been found by

Say = Callable[[str], None]
Gone = list[tuple[int, ...]]  # by layer, the groups that go


def choose(
    base: Checkpoint,
    family: Family,
    domains: Mapping[str, Sequence[Sequence[int]]],
    energy: Sequence[Sequence[float]],
    keep: int,
    directory: Path,
    device: str = "cpu",
    *,
    batch: int = 4,
    say: Say = lambda _: None,
) -> Gone:
    """By layer of `base`, the groups that go, ascending, `keep` of them staying.

    domains: windows of token ids, of which WINDOWS of each are taken, spread evenly. energy: of each layer's groups.
    Kept in a file of `directory` after each layer, from which a later call goes on. Raises CheckpointError for a file
    that can't be read.
    """
    path = directory / f"groups-{keep}.json"
    gone, done = _read(path, energy, keep)
    if done < SWEEPS * len(energy):
        with alone(path, lambda: say("leaving out heads: waiting for another process that does so")):
            gone, done = _read(path, energy, keep)
            if done < SWEEPS * len(energy):
                say("leaving out heads: reading the model")
                windows = [window for those in domains.values() for window in spread(those, WINDOWS)]
                _descend(_Search(base, family, windows, device, batch), gone, done, energy, path, say)
        release(device)
    return gone


def _descend(search: _Search, gone: Gone, done: int, energy: Sequence[Sequence[float]], path: Path, say: Say) -> None:
    """Change `gone` in place, layer after layer; `done` layers of all sweeps are behind."""
    for step in range(done, SWEEPS * len(energy)):
        sweep, layer = divmod(step, len(energy))
        say(f"leaving out heads, sweep {sweep + 1} of {SWEEPS}: layer {layer + 1} of {len(energy)}")
        gone[layer] = search.cheapest(layer, _least(energy[layer], len(gone[layer]) + CANDIDATES - 1), gone)
        write_json(path, {"rules": RULES, "gone": gone, "done": step + 1})


def _read(path: Path, energy: Sequence[Sequence[float]], keep: int) -> tuple[Gone, int]:
    """(the choice so far, how many layers of all sweeps it has seen)."""
    try:
        stored: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rules": None}
        if stored["rules"] == RULES:
            return [tuple(map(int, those)) for those in stored["gone"]], int(stored["done"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"heads {path}: can't be read ({error}); delete it, it is made again") from None
    return [tuple(sorted(_least(those, len(those) - keep))) for those in energy], 0


def _least(energy: Sequence[float], count: int) -> list[int]:
    """So many groups of a layer, the one of the least energy first."""
    return sorted(range(len(energy)), key=lambda group: (energy[group], group))[:count]


class _Search(Predictions):
    """Groups are left out by setting what o reads of them to 0."""

    def __init__(
        self, base: Checkpoint, family: Family, windows: Sequence[Sequence[int]], device: str, batch: int
    ) -> None:
        self.absent: Gone = []  # while it is empty, all are there
        super().__init__(base, family, windows, device, batch, EVERY)
        heads = int(base.config["num_attention_heads"])
        self.width = head_dim(base.config) * heads // int(base.config.get("num_key_value_heads") or heads)
        self.reached: tuple[int, list[torch.Tensor]] = (0, self.start)  # a layer, and what goes into it
        self.now: float | None = None  # what costs the choice as it is
        for layer in range(self.layers.count):
            self.layers.modules[family.in_layer(layer, family.o)].register_forward_pre_hook(self._leaving_out(layer))

    def _leaving_out(self, layer: int) -> Any:
        def hook(module: Any, args: Any) -> Any:
            groups = self.absent[layer] if self.absent else ()
            if not groups:
                return None
            x = args[0].clone()
            for group in groups:
                x[..., group * self.width : (group + 1) * self.width] = 0
            return (x,)

        return hook

    def cheapest(self, layer: int, tried: Sequence[int], gone: Gone) -> tuple[int, ...]:
        """As many groups of this layer as go now, others as in `gone`: the cheapest of `tried`, one after the other, or
        those that go now where that is cheaper.
        """
        self.absent = list(gone)
        start, hidden = self.reached if self.reached[0] <= layer else (0, self.start)
        hidden = list(self.through(range(start, layer), hidden))
        self.reached = layer, hidden

        def cost(groups: tuple[int, ...]) -> float:
            self.absent[layer] = groups
            return self.kl(self.through(range(layer, self.layers.count), hidden))

        if self.now is None:
            self.now = cost(gone[layer])
        known, least = {gone[layer]: self.now}, self.now
        going: tuple[int, ...] = ()
        for _ in gone[layer]:
            each = [tuple(sorted((*going, group))) for group in tried if group not in going]
            costs = {groups: known[groups] if groups in known else cost(groups) for groups in each}
            going = min(each, key=lambda groups: (costs[groups], groups))
            least = costs[going]
        if self.now <= least:
            return gone[layer]
        self.now = least
        return going
