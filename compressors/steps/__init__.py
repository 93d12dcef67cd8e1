"""The steps of a build, one a file; `compressors.plan.STEPS` names them in the order in which they are carried out.

Each step takes the `Build` that the one before it returned, and returns a new one. A file offers what `Step` says.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import torch

from compressors.choices import Value
from compressors.methods import precision, repair
from compressors.methods.quantizers import Rounded
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family
from compressors.plan import STEPS, CompressionPlan
from compressors.statistics.activations import Calibration
from compressors.statistics.second_moments import Moments

Say = Callable[[str], None]
BEGIN_WITH_RIDGE = ("ridge", "distill")


@dataclasses.dataclass(frozen=True)
class Build:
    """The state of a build between two steps; a step returns a new one.

    Attributes:
        plan: The plan that is carried out.
        own: The plan of the base model itself.
        base: The base model.
        family: The base model's family.
        checkpoint: The model so far; its tensors are made when they are loaded.
        layers: The numbers of the base model's layers that it has, ascending.
        activations: Activation statistics of these layers; None: the result has the right shapes alone.
        moments: Second moments of the inputs of these layers; None where the plan needs none.
        whole: Second moments of the base model, all its layers.
        inputs: Part → by layer, the inputs of that projection that stay, int64 [kept].
        outputs: Part → by layer, the outputs of that projection that stay, int64 [kept].
        basis: Basis [E, E] into which the residual stream was turned, a column a component; None: it was not.
        dimensions: Dimensions of the residual stream that stay, int64 [kept]; None: all.
        simulate: Whether quantized weights are multiplied out, for scoring in memory.
        given: What the weights of Linears that a scheme rounds are rounded to, by module; None: the quantizer says.
        rounded: Weights that were rounded for scoring, by module, for the same plan's checkpoint; None: none are kept.
        device: Where the arithmetic is done.
        say: Told what takes long.
    """

    plan: CompressionPlan
    own: CompressionPlan
    base: Checkpoint
    family: Family
    checkpoint: Checkpoint
    layers: tuple[int, ...]
    activations: Calibration | None = None
    moments: Moments | None = None
    whole: Moments | None = None
    inputs: Mapping[str, Sequence[torch.Tensor]] = dataclasses.field(default_factory=dict)
    outputs: Mapping[str, Sequence[torch.Tensor]] = dataclasses.field(default_factory=dict)
    basis: torch.Tensor | None = None
    dimensions: torch.Tensor | None = None
    simulate: bool = False
    given: precision.Given | None = None
    rounded: dict[str, Rounded] | None = None
    device: str = "cpu"
    say: Say = lambda _: None

    def with_kept(
        self,
        checkpoint: Checkpoint,
        inputs: Mapping[str, Sequence[torch.Tensor]],
        outputs: Mapping[str, Sequence[torch.Tensor]] | None = None,
    ) -> Build:
        """Return the build with a cut checkpoint, and what stays of its projections' inputs and outputs."""
        return dataclasses.replace(
            self,
            checkpoint=checkpoint,
            inputs={**self.inputs, **inputs},
            outputs={**self.outputs, **(outputs or {})},
        )


def repaired_by_ridge(cut: Build, before: Checkpoint, parts: Sequence[str]) -> Build:
    """Let projections take over from the inputs that they just lost, where the plan's repair is or begins with `ridge`.

    Args:
        cut: The build after the cut.
        before: The checkpoint before it.
        parts: Projections that lost the same inputs, those that `cut.inputs` holds for the first.
    """
    if cut.plan.repair not in BEGIN_WITH_RIDGE or cut.moments is None:
        return cut
    kept = cut.inputs[parts[0]]
    repaired = repair.take_over(cut.checkpoint, before, cut.family, parts, kept, cut.moments, cut.device)
    return dataclasses.replace(cut, checkpoint=repaired)


class Step(Protocol):
    """A file of this folder: it carries out a part of a plan."""

    # (choice, value) → a tag that is part of the digest of plans with that value; it is changed whenever the same plan
    # would come out otherwise, so that cached models are not used any more
    VERSIONS: Mapping[tuple[str, Value], str]

    def applies(self, plan: CompressionPlan, base: CompressionPlan) -> bool:
        """Whether the step has anything to do for this plan of this base model."""

    def shapes(self, made: Build) -> Build:
        """Carry the step out for sizes alone: the shapes are right, and which values stay is arbitrary.

        Raises InfeasiblePlan.
        """

    def run(self, made: Build) -> Build:
        """Carry the step out; where statistics that it needs are missing, as `shapes` does. Raises InfeasiblePlan."""


def steps() -> dict[str, Step]:
    """Return the steps by name, in the order in which they are carried out."""
    return {name: cast(Step, importlib.import_module(f"{__name__}.{name}")) for name in STEPS}
