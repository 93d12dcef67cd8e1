"""Analyses a model: what it is made of, and what could be cut from it.

Measures nothing: importance comes from a calibration, where there is one.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from compressors import build, possible_cuts
from compressors.methods import depth
from compressors.model import family, structure
from compressors.model.checkpoint import Checkpoint
from compressors.statistics.activations import Calibration
from search.errors import UsageError
from search.show.analysis import Analysis


def analysis_of(path: Path, importance: Calibration | None = None, kernels: build.Kernels | None = None) -> Analysis:
    """Return the structure of a model and its possible cuts.

    Args:
        path: The directory of the model.
        importance: The calibration of this model, where there is one.
        kernels: What the engine's kernels ask for; cuts that they can't run count as infeasible.

    Raises:
        CheckpointError: The model can't be read.
        UsageError: The importance is another model's.
    """
    described = structure.describe_any(path)
    cuts: list[possible_cuts.Cut] = []
    if described.uncuttable is None:
        base = Checkpoint.read(path)
        cuts = possible_cuts.cuts(base, family.family_of(base), kernels=kernels)
    layers = len(described.layers)
    if importance is not None and len(importance.block_influence) != layers:
        raise UsageError(
            f"importance: it was measured on {len(importance.block_influence)} layers, and {path} has {layers}; "
            "measure it on this model"
        )
    return Analysis(
        model=str(path),
        structure=described,
        cuts=tuple(cuts),
        kernel_alignment=kernels is not None,
        block_influence=None if importance is None else tuple(importance.block_influence.tolist()),
        drop_order=None if importance is None else _drop_order(importance),
    )


def _drop_order(importance: Calibration) -> tuple[int, ...]:
    """Return the layers as `depth.choose` drops them, one more each time; the last one always stays."""
    layers = len(importance.block_influence)
    kept = [depth.choose(layers, keep, "importance", importance) for keep in range(layers, 0, -1)]
    return tuple((set(more) - set(fewer)).pop() for more, fewer in itertools.pairwise(kept))
