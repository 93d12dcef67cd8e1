"""Choose which key/value groups to remove in each layer, by the KL divergence of the predictions without all of them.

Coordinate descent, SWEEPS times through the model. It starts from the groups that add the least to their layer's output
(`methods.importance.energy`). Layer after layer it chooses those that are cheapest to leave out while the other layers
go without theirs. The effect of one group depends on which others are absent: SmolLM2's groups chosen one by one, by
the KL of leaving each out of the whole model, were worse than by energy (benchmarks/notes/repair.md). Knows no plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compressors import cached
from compressors.device import release
from compressors.files import alone, digest_of_json
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family, head_dim
from compressors.statistics.predictions import Predictions, spread
from compressors.typed_json import typed

WINDOWS = 16  # of each domain of the calibration text
CANDIDATES = 4  # the number of groups of the least energy that are tried for each one that goes
SWEEPS = 2
EVERY = 4  # the predictions of one in EVERY tokens are compared
VERSION = [2, WINDOWS, CANDIDATES, SWEEPS, EVERY]  # kept choices of another version are searched again

Say = Callable[[str], None]
Gone = list[tuple[int, ...]]  # the groups that go, by layer


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
    """Return the groups to remove by layer of `base`, ascending; `keep` of each layer's stay.

    The choice is kept in a file of `directory` after each layer, and a later call resumes it, unless its energies lead
    to another search.

    Args:
        base: The model.
        family: Its family.
        domains: The windows of token ids by domain; WINDOWS of each are taken, spread evenly.
        energy: The energy of each group, by layer.
        keep: The number of groups that stay in each layer.
        directory: The directory of the file.
        device: The device that runs the model.
        batch: The number of windows that run at once.
        say: A function that is called with what is being done.

    Raises:
        MachineError: When the file can't be written.
    """
    path = directory / f"groups-{keep}.json"
    rules = _rules(energy, keep)
    read = functools.partial(_read, energy=energy, keep=keep, rules=rules)
    gone, done = cached.known(path, read) or _begin(energy, keep)
    if done < SWEEPS * len(energy):
        with alone(path, lambda: say("leaving out heads: waiting for another process that does so")):
            gone, done = cached.known(path, read, held=True) or _begin(energy, keep)
            if done < SWEEPS * len(energy):
                say("leaving out heads: reading the model")
                windows = [window for some in domains.values() for window in spread(some, WINDOWS)]
                _descend(_Search(base, family, windows, device, batch), gone, done, energy, path, rules, say)
        release(device)
    return gone


def _descend(
    search: _Search,
    gone: Gone,
    done: int,
    energy: Sequence[Sequence[float]],
    path: Path,
    rules: list[Any],
    say: Say,
) -> None:
    """Improve `gone` in place, layer after layer; `done` counts the layers of all sweeps that are finished."""
    for step in range(done, SWEEPS * len(energy)):
        sweep, layer = divmod(step, len(energy))
        say(f"leaving out heads, sweep {sweep + 1} of {SWEEPS}: layer {layer + 1} of {len(energy)}")
        gone[layer] = search.cheapest(layer, _tried(energy[layer], len(gone[layer])), gone)
        cached.keep_json(path, {"rules": rules, "gone": gone, "done": step + 1})


def _rules(energy: Sequence[Sequence[float]], keep: int) -> list[Any]:
    """Return what leads to a choice, beside the windows that a directory is for: the rules, and where they start.

    The energies depend on how much each text counts, which a directory of moments is not named by.
    """
    begun, _ = _begin(energy, keep)
    tried = [sorted(_tried(of_layer, len(of_layer) - keep)) for of_layer in energy]
    return [*VERSION, digest_of_json([begun, tried], 16)]


def _read(path: Path, energy: Sequence[Sequence[float]], keep: int, rules: list[Any]) -> tuple[Gone, int]:
    """Return (the choice so far, the number of layers of all sweeps that are finished)."""
    stored = cached.read_json(path)
    if stored["rules"] != rules:
        return _begin(energy, keep)
    gone, done = typed(list[tuple[int, ...]], stored["gone"], "gone"), typed(int, stored["done"], "done")
    if len(gone) != len(energy) or not 0 <= done <= SWEEPS * len(energy):
        raise ValueError(f"it holds {len(gone)} layers, of which {done} are done")
    for groups, of_layer in zip(gone, energy, strict=True):
        if len({*groups} & {*range(len(of_layer))}) != len(of_layer) - keep or len(groups) != len(of_layer) - keep:
            raise ValueError(f"it removes groups {list(groups)} of {len(of_layer)} to keep {keep}")
    return gone, done


def _begin(energy: Sequence[Sequence[float]], keep: int) -> tuple[Gone, int]:
    return [tuple(sorted(_least(of_layer, len(of_layer) - keep))) for of_layer in energy], 0


def _tried(energy: Sequence[float], going: int) -> list[int]:
    """Return the groups of a layer that are tried where `going` of them go."""
    return _least(energy, going + CANDIDATES - 1)


def _least(energy: Sequence[float], count: int) -> list[int]:
    """Return `count` groups of a layer, the one of the least energy first."""
    return sorted(range(len(energy)), key=lambda group: (energy[group], group))[:count]


class _Search(Predictions):
    """_Search leaves groups out by setting what o reads of them to 0."""

    def __init__(
        self, base: Checkpoint, family: Family, windows: Sequence[Sequence[int]], device: str, batch: int
    ) -> None:
        self.absent: Gone = []  # empty: no group is left out
        super().__init__(base, family, windows, device, batch, EVERY)
        heads = int(base.config["num_attention_heads"])
        self.width = head_dim(base.config) * heads // int(base.config.get("num_key_value_heads") or heads)
        self.reached: tuple[int, list[torch.Tensor]] = (0, self.start)  # a layer and its input
        self.now: float | None = None  # the cost of the present choice
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
        """Return the groups of this layer to remove, as many as now, while the other layers are as in `gone`.

        The cheapest of `tried` are added one after the other; if the present choice is cheaper, it stays.
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
