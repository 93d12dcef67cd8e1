"""Quality in memory, shard by shard."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from evaluator import quality
from search.files import read_json


@dataclasses.dataclass(frozen=True)
class Screen:
    """Quality in memory, one entry a shard: mean NLL and KL in nats per token, top-1 agreement with the base."""

    nll: tuple[float, ...]
    kl: tuple[float | None, ...]
    agreement: tuple[float | None, ...]


def read_screen(path: Path) -> Screen | None:
    saved = read_json(path)
    return None if saved is None else Screen(**{name: tuple(values) for name, values in saved.items()})


def screen_of_shards(found: list[quality.ShardQuality]) -> Screen:
    return Screen(
        nll=tuple(shard.nll for shard in found),
        kl=tuple(shard.kl for shard in found),
        agreement=tuple(shard.agreement for shard in found),
    )


def mean_known(values: tuple[float | None, ...]) -> float | None:
    """Over the shards that the reference covers."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
