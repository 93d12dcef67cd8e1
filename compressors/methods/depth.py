"""Depth: fewer layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from compressors.errors import InfeasiblePlan
from compressors.model.checkpoint import Checkpoint, stock_config
from compressors.model.family import Family
from compressors.plan import CHOICES, layers_named
from compressors.statistics.activations import Calibration

BY_KL = ("kl", "kl-look-ahead")


def choose(
    layers: int, keep: int, drop_from: str, calibration: Calibration | None, order: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Which `keep` of `layers` stay, ascending.

    drop_from: "top" drops the last, "bottom" the first; "importance" those of least block influence, 1 − cos of a
    layer's input and output on the calibration text (ShortGPT, https://arxiv.org/abs/2403.03853); "kl" and
    "kl-look-ahead" the first of `order`; "3,7" just those.
    """
    if not 1 <= keep <= layers:
        raise InfeasiblePlan(f"num_hidden_layers: {keep} of {layers} can't stay; choose from 1 to {layers}")
    named = layers_named(drop_from)
    if named is not None and keep < layers:
        if len(named) != layers - keep or named[-1] >= layers:
            raise InfeasiblePlan(
                f"drop_from: {drop_from} names {len(named)} of the layers 0 to {layers - 1}, and to keep {keep} of "
                f"{layers}, {layers - keep} have to go"
            )
        return tuple(index for index in range(layers) if index not in named)
    if keep == layers or drop_from == "top":
        return tuple(range(keep))
    if drop_from == "bottom":
        return tuple(range(layers - keep, layers))
    if drop_from in BY_KL:
        if order is None:
            raise InfeasiblePlan(f"drop_from: {drop_from} is measured on calibration text, and there is none")
        return tuple(index for index in range(layers) if index not in set(order[: layers - keep]))
    if drop_from != "importance":
        known = ", ".join(map(str, CHOICES["drop_from"].values))
        raise InfeasiblePlan(f"drop_from: {drop_from!r} is not one of {known}, nor a list of layers")
    if calibration is None:
        raise InfeasiblePlan(
            "drop_from: importance is measured on calibration text, and there is none; calibrate first"
        )
    influence = calibration.block_influence.tolist()
    by_influence = sorted(range(layers), key=lambda index: (-influence[index], index))
    return tuple(sorted(by_influence[:keep]))


def cut(checkpoint: Checkpoint, family: Family, kept: Sequence[int]) -> Checkpoint:
    """Keep these layers of the checkpoint (ascending numbers), renumbered from 0.

    Lists with an entry per layer are written out, since the rule that a stock config makes them by (each fourth layer
    is another) counts from the model's own first layer.
    """
    config = dict(checkpoint.config)
    layers = int(config["num_hidden_layers"])
    if list(kept) == list(range(layers)):
        return checkpoint
    tensors = {}
    new_number = {f"{family.layer(old)}.": f"{family.layer(new)}." for new, old in enumerate(kept)}
    for name, tensor in checkpoint.tensors.items():
        if not name.startswith(f"{family.layers}."):
            tensors[name] = tensor
            continue
        prefix = ".".join(name.split(".")[: family.layers.count(".") + 2]) + "."
        if prefix in new_number:
            tensors[new_number[prefix] + name.removeprefix(prefix)] = tensor
    config["num_hidden_layers"] = len(kept)
    stock = stock_config(checkpoint.config)
    for key in family.per_layer:
        entries = getattr(stock, key, None)
        if isinstance(entries, list):
            config[key] = [entries[old] for old in kept]
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)
