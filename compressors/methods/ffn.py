"""FFN width: fewer channels between up and down projection, the same number in every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from compressors.errors import InfeasiblePlan
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family, take_columns, take_rows
from compressors.statistics.activations import Calibration


def choose_all(checkpoint: Checkpoint, keep: int, calibration: Calibration | None) -> list[torch.Tensor]:
    """The channels that stay in each layer, int64 [keep], ascending: those of the largest mean activity at the input of
    down_proj (Minitron, https://arxiv.org/abs/2407.14679); without a calibration the first.
    """
    width = int(checkpoint.config["intermediate_size"])
    if not 1 <= keep <= width:
        raise InfeasiblePlan(f"intermediate_size: {keep} of {width} channels can't stay; choose from 1 to {width}")
    layers = int(checkpoint.config["num_hidden_layers"])
    if calibration is None:
        return [torch.arange(keep)] * layers
    activity = calibration.ffn_activity  # (L, F)
    return [torch.topk(activity[layer], keep).indices.sort().values for layer in range(layers)]


def cut(checkpoint: Checkpoint, family: Family, kept: Sequence[torch.Tensor]) -> Checkpoint:
    """Keep these channels of each layer: rows of gate and up with their biases, columns of down."""
    tensors = dict(checkpoint.tensors)
    for layer, index in enumerate(kept):
        for part in (family.gate, family.up):
            take_rows(tensors, family.in_layer(layer, part), index)
        take_columns(tensors, family.in_layer(layer, family.down), index)
    config = {**checkpoint.config, "intermediate_size": len(kept[0])}
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)
