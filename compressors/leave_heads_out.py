"""Which key/value groups of each layer do the least damage when they go together with those of all other layers, by the
KL divergence of what is predicted then.

Coordinate descent: from the groups that add the least to their layer's output (`methods.importance.energy`), layer
after layer, those that are the cheapest to leave out while the other layers go without theirs; SWEEPS times through the
model. What the absence of one does depends on which others are absent: chosen each by itself, by the KL of leaving it
out of the whole model, SmolLM2's groups were worse than by energy (benchmarks/README.md). Knows no plan.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compressors.checkpoint import Checkpoint
from compressors.errors import CheckpointError
from compressors.family import Family, head_dim
from compressors.lock import alone
from compressors.predictions import Predictions, spread

WINDOWS = 16  # of each domain of the calibration text
CANDIDATES = 4  # groups of a layer that are tried, those of the least energy
SWEEPS = 2
RULES = [1, WINDOWS, CANDIDATES, SWEEPS]  # what a choice that was kept must have been found by

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
    steps = SWEEPS * len(energy)
    if done < steps:
        with alone(path, lambda: say("leaving out heads: waiting for another process that does so")):
            gone, done = _read(path, energy, keep)
            if done < steps:
                say("leaving out heads: reading the model")
                windows = [window for those in domains.values() for window in spread(those, WINDOWS)]
                search = _Search(base, family, windows, device, batch)
            while done < steps:
                sweep, layer = divmod(done, len(energy))
                say(f"leaving out heads, sweep {sweep + 1} of {SWEEPS}: layer {layer + 1} of {len(energy)}")
                order = sorted(range(len(energy[layer])), key=lambda group: (energy[layer][group], group))
                tried = order[: max(CANDIDATES, len(energy[layer]) - keep)]
                gone[layer] = search.cheapest(layer, tried, gone)
                done += 1
                _write(path, gone, done)
    return gone


def _read(path: Path, energy: Sequence[Sequence[float]], keep: int) -> tuple[Gone, int]:
    """(the choice so far, how many layers of all sweeps it has seen)."""
    try:
        stored: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rules": None}
        if stored["rules"] == RULES:
            return [tuple(map(int, those)) for those in stored["gone"]], int(stored["done"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"heads {path}: can't be read ({error}); delete it, it is made again") from None
    least = [sorted(range(len(those)), key=lambda group: (those[group], group)) for those in energy]
    return [tuple(sorted(groups[: len(groups) - keep])) for groups in least], 0


def _write(path: Path, gone: Gone, done: int) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as out:
        json.dump({"rules": RULES, "gone": gone, "done": done}, out)
    Path(out.name).chmod(0o644)
    Path(out.name).replace(path)


class _Search(Predictions):
    """Groups are left out by setting what o reads of them to 0."""

    def __init__(
        self, base: Checkpoint, family: Family, windows: Sequence[Sequence[int]], device: str, batch: int
    ) -> None:
        self.absent: Gone = []  # while it is empty, all are there
        super().__init__(base, family, windows, device, batch)
        heads = int(base.config["num_attention_heads"])
        self.width = head_dim(base.config) * heads // int(base.config.get("num_key_value_heads") or heads)
        self.reached: tuple[int, list[torch.Tensor]] = (0, self.start)  # a layer, and what goes into it
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
        """The groups of `tried` that cost least when as many go as do now, one after the other; others as in `gone`."""
        self.absent = list(gone)
        start, hidden = self.reached if self.reached[0] <= layer else (0, self.start)
        hidden = list(self.through(range(start, layer), hidden))
        self.reached = layer, hidden
        going: tuple[int, ...] = ()
        for _ in gone[layer]:
            costs = {group: self._cost(layer, (*going, group), hidden) for group in tried if group not in going}
            going = (*going, min(costs, key=lambda group: (costs[group], group)))
        return tuple(sorted(going))

    def _cost(self, layer: int, groups: tuple[int, ...], hidden: Sequence[torch.Tensor]) -> float:
        self.absent[layer] = groups
        return self.kl(self.through(range(layer, self.layers.count), hidden))
