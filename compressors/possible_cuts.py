"""List what could be cut from a model, and what each cut would save."""

from __future__ import annotations

import dataclasses
from typing import Any

from compressors import build
from compressors.errors import CompressionError
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family
from compressors.plan import CompressionPlan

TRIED_PRECISIONS = ("float16", "W8A8", "FP8_DYNAMIC", "W4A16")
FFN_STEP = 128  # channels


@dataclasses.dataclass(frozen=True)
class Cut:
    """Cut is one plan with what it saves against the uncut model; savings are None where the plan has no valid shapes.

    Attributes:
        what: The change, for people: `layers 30 → 29`.
        plan: The plan that makes this one change.
        parameters_saved: The number of parameters saved.
        bytes_saved: The bytes of weights saved.
        decode_bytes_saved: The bytes saved of what one decode step reads.
        share: The share of the model's bytes that is saved.
        infeasible: The reason why the plan can't be built, loaded or served fast, or None.
    """

    what: str
    plan: CompressionPlan
    parameters_saved: int | None
    bytes_saved: int | None
    decode_bytes_saved: int | None
    share: float | None
    infeasible: str | None


def cuts(checkpoint: Checkpoint, family: Family, *, kernels: build.Kernels | None = None) -> list[Cut]:
    """Return one step along each dimension and each other precision; only headers are read.

    Args:
        checkpoint: The model to cut.
        family: Its family.
        kernels: What an engine's kernels ask for, as in `build.check`.
    """
    own = CompressionPlan.identity(checkpoint.config)
    return [
        _cut(what, dataclasses.replace(own, **changes), checkpoint, family, kernels) for what, changes in _steps(own)
    ]


def _steps(own: CompressionPlan) -> list[tuple[str, dict[str, Any]]]:
    layers, heads, groups = own.num_hidden_layers, own.num_attention_heads, own.num_key_value_heads
    per_group, width, channels = heads // groups, own.hidden_size, own.intermediate_size
    eighth = max(channels // 8, 1)
    narrow = channels - (FFN_STEP if channels % FFN_STEP == 0 and eighth >= FFN_STEP else eighth)
    slim = width - max(width // 8, 1)
    return [
        *((f"layers {layers} → {layers - n}", {"num_hidden_layers": layers - n}) for n in (1, 2)),
        (
            f"key/value groups {groups} → {groups - 1} (query heads {heads} → {heads - per_group})",
            {"num_key_value_heads": groups - 1, "num_attention_heads": heads - per_group},
        ),
        (
            f"query heads per group {per_group} → {per_group - 1} ({heads} → {heads - groups})",
            {"num_attention_heads": heads - groups},
        ),
        (f"FFN width {channels} → {narrow}", {"intermediate_size": narrow}),
        (f"hidden size {width} → {slim}", {"hidden_size": slim}),
        *((f"{own.precision} → {name}", {"precision": name}) for name in TRIED_PRECISIONS if name != own.precision),
    ]


def _cut(what: str, plan: CompressionPlan, base: Checkpoint, family: Family, kernels: build.Kernels | None) -> Cut:
    reason = build.check(plan, base, family, kernels=kernels)
    try:
        cut = build.shapes(plan, base, family)
    except CompressionError:
        return Cut(what, plan, None, None, None, None, reason)
    saved = base.size_bytes - cut.size_bytes
    return Cut(
        what,
        plan,
        parameters_saved=base.total_parameters - cut.total_parameters,
        bytes_saved=saved,
        decode_bytes_saved=base.decode_bytes - cut.decode_bytes,
        share=saved / base.size_bytes,
        infeasible=reason,
    )
