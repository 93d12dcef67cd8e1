"""Describes what a model is made of and what could be cut from it, as values that JSON can hold.

Measures nothing: importance comes from a calibration, where there is one.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from compressors import build, possible_cuts
from compressors.methods import depth
from compressors.model import family, structure
from compressors.model.checkpoint import Checkpoint
from compressors.statistics.activations import Calibration
from search.errors import UsageError

SIZES = (
    *("num_attention_heads", "num_key_value_heads", "heads_per_group", "head_dim"),
    *("hidden_size", "intermediate_size", "vocab_size"),
)


def analyze(path: Path, importance: Calibration | None = None, kernels: build.Kernels | None = None) -> dict[str, Any]:
    """Return the structure of a model, as values that JSON can hold.

    Sizes are bytes, shares are parts of the model's bytes. `uncuttable` says why there are no `cuts`, or is None. With
    `importance` each layer has its `block_influence` [0, 2], and `drop_order` lists the layers in the order in which
    they would be dropped.

    Args:
        path: The directory of the model.
        importance: The calibration of this model, where there is one.
        kernels: What the engine's kernels ask for; cuts that they can't run count as infeasible.

    Raises:
        CheckpointError: The model can't be read.
        UsageError: The importance is another model's.
    """
    made = structure.describe_any(path)
    cuts: list[possible_cuts.Cut] = []
    if made.uncuttable is None:
        base = Checkpoint.read(path)
        cuts = possible_cuts.cuts(base, family.family_of(base), kernels=kernels)
    layers = [_layer(layer, made.bytes) for layer in made.layers]
    if importance is not None:
        if len(importance.block_influence) != len(layers):
            raise UsageError(
                f"importance: it was measured on {len(importance.block_influence)} layers, and {path} has "
                f"{len(layers)}; measure it on this model"
            )
        for layer, influence in zip(layers, importance.block_influence.tolist(), strict=True):
            layer["block_influence"] = influence
    return {
        "model": str(path),
        "model_type": made.model_type,
        "dtype": made.dtype,
        "quantization": made.quantization,
        "parameters": made.parameters,
        "bytes": made.bytes,
        "decode_bytes": made.decode_bytes,
        "num_hidden_layers": len(layers),
        **{name: getattr(made, name) for name in SIZES},
        "tied": made.tied,
        "parts": [_part(part, made.bytes) for part in made.parts],
        "layers": layers,
        "drop_order": _drop_order(importance) if importance is not None else None,
        "kernel_alignment": kernels is not None,
        "cuts": [
            {
                "what": cut.what,
                "plan": cut.plan.to_dict(),
                "parameters_saved": cut.parameters_saved,
                "bytes_saved": cut.bytes_saved,
                "decode_bytes_saved": cut.decode_bytes_saved,
                "share": cut.share,
                "infeasible": cut.infeasible,
            }
            for cut in cuts
        ],
        "uncuttable": made.uncuttable,
    }


def _part(part: structure.Part, total: int) -> dict[str, Any]:
    weights = [
        {
            **_sums(weight, total),
            "shape": None if weight.shape is None else list(weight.shape),
            "dtype": weight.dtype,
        }
        for weight in part.parts
    ]
    return {**_sums(part, total), "parts": weights}


def _sums(part: structure.Part, total: int) -> dict[str, Any]:
    share = part.bytes / total if total else 0.0
    return {
        "name": part.name,
        "parameters": part.parameters,
        "bytes": part.bytes,
        "share": share,
        "count": part.count,
    }


def _layer(layer: structure.LayerStructure, total: int) -> dict[str, Any]:
    whole = layer.total
    sums = _sums(whole, total)
    return {
        "index": layer.index,
        **{name: sums[name] for name in ("parameters", "bytes", "share")},
        "parts": [_part(part, total) for part in whole.parts],
    }


def _drop_order(importance: Calibration) -> list[int]:
    """Return the layers as `depth.choose` drops them, one more each time; the last one always stays."""
    layers = len(importance.block_influence)
    kept = [depth.choose(layers, keep, "importance", importance) for keep in range(layers, 0, -1)]
    return [(set(more) - set(fewer)).pop() for more, fewer in itertools.pairwise(kept)]
