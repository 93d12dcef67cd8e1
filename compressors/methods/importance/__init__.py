"""Which FFN channels, key/value groups and query heads stay: one measure a file, its name that of the choice.

A channel is one input of down_proj; a head is a block of head_dim inputs of o_proj. Symbols: W [N, K] the projection
that reads them, H [K, K] the second moment of its input, μ its mean. A file offers what `Measure` says.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, cast

import torch

from compressors.choices import Need
from compressors.errors import InfeasiblePlan
from compressors.methods import heads
from compressors.methods.heads import Kept
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family, head_dim
from compressors.plan import CHOICES
from compressors.statistics.activations import Calibration
from compressors.statistics.second_moments import Moment, Moments


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """A projection of one layer, some of whose inputs go: down_proj or o_proj. Nothing is read before it is used.

    Attributes:
        load_weight: Reads W [N, K].
        load_moment: Reads the second moment of its input.
        activity: Mean activity of each channel or head on the calibration text; None: it is not known.
    """

    load_weight: Callable[[], torch.Tensor]
    load_moment: Callable[[], Moment]
    activity: torch.Tensor | None = None

    @functools.cached_property
    def weight(self) -> torch.Tensor:
        """W [N, K]."""
        return self.load_weight()

    @functools.cached_property
    def moment(self) -> Moment:
        """H [K, K] and μ [K], the mean over the domains of the calibration text."""
        return self.load_moment()


@dataclasses.dataclass(frozen=True)
class HeadCounts:
    """How many query heads and key/value groups a layer has, how many it keeps, and `size`, its head_dim."""

    heads: int
    groups: int
    keep_heads: int
    keep_groups: int
    size: int


class Measure(Protocol):
    """A file of this folder."""

    def channels(self, reader: Reader, keep: int) -> torch.Tensor:
        """Choose the channels that stay in a layer: int64 [keep], ascending."""

    def heads(self, reader: Reader, counts: HeadCounts, gone: Sequence[int] | None = None) -> Kept:
        """Choose the groups that stay in a layer, and in each the query heads; the groups `gone` have to go."""


def names() -> list[str]:
    """Return the measures that exist: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def measure(name: str, moments: Moments | None) -> Measure:
    """Return the measure of that name, or `activation` where it needs second moments that are not known."""
    if moments is None and Need.SECOND_MOMENTS in CHOICES["importance"].needs(name):
        name = "activation"
    return cast(Measure, importlib.import_module(f"{__name__}.{name}"))


def choose_channels(
    checkpoint: Checkpoint,
    family: Family,
    keep: int,
    name: str,
    *,
    activations: Calibration | None = None,
    moments: Moments | None = None,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """Choose the FFN channels that stay in each layer by the measure `name`: int64 [keep] each, ascending."""
    by = measure(name, moments)
    activity = None if activations is None else activations.ffn_activity
    readers = _readers(checkpoint, family, family.down, activity, moments, device)
    return [by.channels(reader, keep).cpu() for reader in readers]


def choose_heads(
    checkpoint: Checkpoint,
    family: Family,
    keep_heads: int,
    keep_groups: int,
    name: str,
    *,
    activations: Calibration | None = None,
    moments: Moments | None = None,
    device: str = "cpu",
    gone: Sequence[Sequence[int]] | None = None,
) -> list[Kept]:
    """Choose the heads that stay in each layer: whole key/value groups go first, then query heads of each group.

    Args:
        checkpoint: The model whose heads go.
        family: Its family.
        keep_heads: Query heads that stay.
        keep_groups: Key/value groups that stay; all keep the same number of query heads.
        name: The measure.
        activations: Statistics of its layers, for `activation`.
        moments: Second moments of its layers, for all others.
        device: Where the arithmetic is done.
        gone: By layer, the groups that go, where something else has chosen them.
    """
    by, config = measure(name, moments), checkpoint.config
    count = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or count)
    counts = HeadCounts(count, groups, keep_heads, keep_groups, head_dim(config))
    reason = heads.infeasible(count, groups, keep_heads, keep_groups)
    if reason:
        raise InfeasiblePlan(reason)
    activity = None if activations is None else activations.head_activity
    readers = _readers(checkpoint, family, family.o, activity, moments, device)
    return [by.heads(reader, counts, None if gone is None else gone[layer]) for layer, reader in enumerate(readers)]


def _readers(
    checkpoint: Checkpoint,
    family: Family,
    part: str,
    activity: torch.Tensor | None,
    moments: Moments | None,
    device: str,
) -> Iterator[Reader]:
    """Yield each layer's reader, which is to be dropped before the next one reads: at 8B its H is a gigabyte."""

    def weight(layer: int) -> torch.Tensor:
        return checkpoint.tensors[f"{family.in_layer(layer, part)}.weight"].load().to(device)

    def moment(layer: int) -> Moment:
        assert moments is not None
        return moments.mixed(layer, part, device)

    for layer in range(int(checkpoint.config["num_hidden_layers"])):
        yield Reader(
            functools.partial(weight, layer),
            functools.partial(moment, layer),
            None if activity is None else activity[layer],
        )


def group_energies(checkpoint: Checkpoint, family: Family, moments: Moments, device: str = "cpu") -> list[list[float]]:
    """Return by layer what the heads of each key/value group add to o_proj's output, see `importance.energy`."""
    from compressors.methods.importance.energy import energy

    count = int(checkpoint.config["num_attention_heads"])
    width = head_dim(checkpoint.config) * count // int(checkpoint.config.get("num_key_value_heads") or count)
    readers = _readers(checkpoint, family, family.o, None, moments, device)
    return [energy(reader.weight, reader.moment, width).tolist() for reader in readers]
