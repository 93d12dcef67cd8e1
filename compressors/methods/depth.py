"""Cut depth: choose which layers go, and renumber the rest."""

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
    """Return which `keep` of `layers` stay, ascending.

    Args:
        layers: The number of layers.
        keep: The number of layers to keep.
        drop_from: "top" drops the last layers and "bottom" the first. "importance" drops those of least block
            influence, 1 − cos of a layer's input and output on the calibration text (ShortGPT,
            https://arxiv.org/abs/2403.03853); "kl" and "kl-look-ahead" drop the first of `order`, and "3,7" drops
            layers 3 and 7.
        calibration: The activation statistics, for "importance".
        order: The layers in the order in which they go, for "kl" and "kl-look-ahead".

    Raises:
        InfeasiblePlan: When the layers can't be kept, or what `drop_from` needs is missing.
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
            raise InfeasiblePlan(f"drop_from: {drop_from} needs calibration text, and there is none; add some")
        return tuple(index for index in range(layers) if index not in set(order[: layers - keep]))
    if drop_from != "importance":
        known = ", ".join(map(str, CHOICES["drop_from"].values))
        raise InfeasiblePlan(f"drop_from: {drop_from!r} is not one of {known}, nor a list of layers")
    if calibration is None:
        raise InfeasiblePlan("drop_from: importance needs calibration statistics, and there are none; calibrate first")
    influence = calibration.block_influence.tolist()
    by_influence = sorted(range(layers), key=lambda index: (-influence[index], index))
    return tuple(sorted(by_influence[:keep]))


def cut(checkpoint: Checkpoint, family: Family, kept: Sequence[int]) -> Checkpoint:
    """Keep the layers `kept` (ascending numbers) of the checkpoint, renumbered from 0.

    Lists with an entry per layer are written out. A stock config derives them by a rule, such as every fourth layer,
    that counts from the first layer of the uncut model.
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
