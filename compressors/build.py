"""Build a plan's checkpoint; say before anything is built which plans can be built and served, and why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import transformers

from compressors.choices import Need
from compressors.errors import CheckpointError, InfeasiblePlan
from compressors.methods import heads
from compressors.methods.quantizers import Rounded
from compressors.model.checkpoint import Checkpoint, stock_config
from compressors.model.family import Family, head_dim
from compressors.plan import DIMENSIONS, CompressionPlan, why_choices_clash
from compressors.statistics.activations import Calibration
from compressors.statistics.second_moments import Moments
from compressors.steps import Build, Say, Step, steps

TAGGED_FIRST = ("stream", "heads")  # whose tags come first in a digest: they are older than the order of the steps


class Kernel(Protocol):
    """The sizes that an engine's kernel for a scheme takes: multiples of `rows` × `columns`."""

    @property
    def name(self) -> str:
        """The name of the kernel, for messages."""
        ...

    @property
    def rows(self) -> int:
        """The number that the output width has to be a multiple of."""
        ...

    @property
    def columns(self) -> int:
        """The number that the input width has to be a multiple of."""
        ...


class Kernels(Protocol):
    """What an engine's fast kernels ask of a model's sizes.

    A backend of `evaluator` states its own (`evaluator.backends`); this package only holds a plan against them.
    """

    @property
    def engine(self) -> str:
        """The name of the engine, for messages."""
        ...

    @property
    def head_dim(self) -> int:
        """The number that the size of a head has to be a multiple of."""
        ...

    @property
    def schemes(self) -> Mapping[str, Kernel]:
        """The kernel of each scheme."""
        ...


def apply(
    plan: CompressionPlan,
    base: Checkpoint,
    family: Family,
    activations: Calibration | None,
    *,
    moments: Moments | None = None,
    simulate: bool = False,
    rounded: dict[str, Rounded] | None = None,
    device: str = "cpu",
    say: Say = lambda _: None,
) -> Checkpoint:
    """Build the compressed checkpoint. Its weights are read when they are used.

    Args:
        plan: The plan, in its canonical form.
        base: The base model.
        family: The base model's family.
        activations: Activation statistics of the base model. None: the result has the right shapes, and arbitrary
            values where something is cut.
        moments: Second moments of the base model, for a plan that needs them (`CompressionPlan.needs`).
        simulate: Make quantized plans a model of plain tensors that computes the same, for scoring in memory.
        rounded: Filled with the rounded weights, a byte each, where `simulate` is set; else taken from, so that none is
            rounded again. It must be of the same plan, base model and statistics.
        device: Where the arithmetic is done, and where the base model is run if a choice asks for that.
        say: Told what takes long.

    Raises:
        InfeasiblePlan: The plan can't be built from this model.
    """
    own = CompressionPlan.identity(base.config)
    made = Build(
        plan=plan,
        own=own,
        base=base,
        family=family,
        checkpoint=base,
        layers=tuple(range(own.num_hidden_layers)),
        activations=activations,
        moments=moments,
        whole=moments,
        simulate=simulate,
        rounded=rounded,
        device="cpu" if device == "mps" else device,  # which has no float64
        say=say,
    )
    return _carried_out(made, lambda step, so_far: step.run(so_far))


def shapes(plan: CompressionPlan, base: Checkpoint, family: Family) -> Checkpoint:
    """Build a checkpoint that has this plan's shapes and dtypes, and arbitrary values: use it for sizes only.

    Raises:
        InfeasiblePlan: The plan can't be built from this model.
    """
    own = CompressionPlan.identity(base.config)
    made = Build(plan, own, base, family, base, tuple(range(own.num_hidden_layers)))
    return _carried_out(made, lambda step, so_far: step.shapes(so_far))


def _carried_out(made: Build, carry_out: Callable[[Step, Build], Build]) -> Checkpoint:
    for step in steps().values():
        if step.applies(made.plan, made.own):
            made = carry_out(step, made)
    checkpoint = made.checkpoint
    config = {
        "architectures": [made.family.architecture],
        **checkpoint.config,
        "head_dim": head_dim(made.base.config),
        "transformers_version": transformers.__version__,
    }
    return dataclasses.replace(checkpoint, config=config)


def needs_activations(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Say whether anything of the base model is chosen by statistics of its activations."""
    by_rule = plan.num_hidden_layers != base.num_hidden_layers and Need.ACTIVATIONS in plan.needs
    widths = (name for name in DIMENSIONS if name != "num_hidden_layers")
    return by_rule or any(getattr(plan, width) != getattr(base, width) for width in widths)


def needs_moments(plan: CompressionPlan) -> bool:
    """Say whether anything of the plan rests on second moments, or on the text that they are of."""
    return Need.SECOND_MOMENTS in plan.needs


def versions(plan: CompressionPlan) -> list[str]:
    """Return the version tags of the methods that this plan uses; a new tag invalidates cached models."""
    tags = {name: step.VERSIONS for name, step in steps().items()}
    ordered = [*(tags.pop(name) for name in TAGGED_FIRST), *tags.values()]
    return [tag for of_step in ordered for (name, value), tag in of_step.items() if getattr(plan, name) == value]


def all_versions() -> list[str]:
    """Return the version tags of all methods."""
    return sorted(tag for step in steps().values() for tag in step.VERSIONS.values())


def predicted_bytes(plan: CompressionPlan, base: Checkpoint, family: Family) -> int:
    """Return the size of the plan's model.safetensors, header included, before anything is built.

    Raises:
        InfeasiblePlan: The plan can't be built from this model.
    """
    return shapes(plan, base, family).file_bytes


def check(
    plan: CompressionPlan,
    base: Checkpoint,
    family: Family,
    *,
    kernels: Kernels | None = None,
    max_bytes: int | None = None,
) -> str | None:
    """Say why the plan can't be built, loaded or served fast; None where it can.

    Args:
        plan: The plan.
        base: The base model.
        family: The base model's family.
        kernels: What the engine's kernels ask for; without it an engine may fall back to slow ones silently.
        max_bytes: The largest model.safetensors.
    """
    own = CompressionPlan.identity(base.config)
    reason = (
        heads.infeasible(
            own.num_attention_heads, own.num_key_value_heads, plan.num_attention_heads, plan.num_key_value_heads
        )
        or _grown(plan, own)
        or why_choices_clash(plan)
    )
    if reason:
        return reason
    try:
        made = shapes(plan, base, family)
        stock_config(made.config)
    except (InfeasiblePlan, CheckpointError) as error:
        return str(error)
    return (None if kernels is None else _misaligned(plan, made, family, kernels)) or oversized(made, max_bytes)


def _grown(plan: CompressionPlan, own: CompressionPlan) -> str | None:
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size"):
        wanted, most = getattr(plan, name), getattr(own, name)
        if not 1 <= wanted <= most:
            return f"{name}: {wanted} must be from 1 to the model's {most}"
    return None


def require_size(made: Checkpoint, max_bytes: int | None) -> None:
    """Refuse a checkpoint that is `oversized`.

    Raises:
        InfeasiblePlan: Its file is larger than `max_bytes`.
    """
    reason = oversized(made, max_bytes)
    if reason:
        raise InfeasiblePlan(reason)


def oversized(made: Checkpoint, max_bytes: int | None) -> str | None:
    """Say why the checkpoint's model.safetensors is too large, or None.

    Sizes that are predicted (`check`) are too small for plans with `keep_16_bit`: ask again once it is built.
    """
    if max_bytes is None or made.file_bytes <= max_bytes:
        return None
    return f"size: {made.file_bytes / 1e6:.1f} MB exceeds the limit of {max_bytes / 1e6:.1f} MB (limits.max_size_mb)"


def _misaligned(plan: CompressionPlan, made: Checkpoint, family: Family, kernels: Kernels) -> str | None:
    """The first projection that no fast kernel takes; of those that run as one matrix (q, k, v), the rows are added."""
    size = head_dim(made.config)
    if size % kernels.head_dim:
        return f"head_dim: {size} is no multiple of {kernels.head_dim}, which the attention kernels want"
    kernel = kernels.schemes.get(plan.precision)
    if kernel is None:
        return None
    for parts in family.fused:
        sizes = [_linear_shape(made, family.in_layer(0, part)) for part in parts]
        n, k = sum(shape[0] for shape in sizes), sizes[0][1]
        if n % kernel.rows or k % kernel.columns:
            names = "+".join(part.rpartition(".")[2] for part in parts)
            return (
                f"{plan.precision}: {names} is {n} × {k}, and {kernels.engine}'s {kernel.name} kernel wants multiples "
                f"of {kernel.rows} × {kernel.columns}; choose sizes that give them"
            )
    return None


def _linear_shape(made: Checkpoint, module: str) -> tuple[int, int]:
    weight = made.tensors.get(f"{module}.weight")
    if weight is None:  # packed: 8 values in an int32
        rows, words = made.tensors[f"{module}.weight_packed"].shape
        return rows, words * 8
    return weight.shape[0], weight.shape[1]
