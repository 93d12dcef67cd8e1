"""Narrows the feed-forward networks: removes channels between up and down projection, equally many in every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from compressors.errors import InfeasiblePlan
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family, take_columns, take_rows


def require(keep: int, width: int) -> None:
    """Refuse to keep no channel, or more than the model has.

    Raises:
        InfeasiblePlan: `keep` is not from 1 to `width`.
    """
    if not 1 <= keep <= width:
        raise InfeasiblePlan(f"intermediate_size: {keep} of {width} channels can't stay; choose from 1 to {width}")


def cut(checkpoint: Checkpoint, family: Family, kept: Sequence[torch.Tensor]) -> Checkpoint:
    """Keep the channels in `kept` of each layer: rows of gate and up with their biases, and columns of down."""
    tensors = dict(checkpoint.tensors)
    for layer, index in enumerate(kept):
        for part in (family.gate, family.up):
            take_rows(tensors, family.in_layer(layer, part), index)
        take_columns(tensors, family.in_layer(layer, family.down), index)
    config = {**checkpoint.config, "intermediate_size": len(kept[0])}
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)
