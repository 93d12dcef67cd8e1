"""The axes of a plan whose losses are added: its dimensions, with query heads counted for each key/value head."""

from __future__ import annotations

from compressors.plan import DIMENSIONS, CompressionPlan

QUERIES = "queries for each key/value head"  # the axis of num_attention_heads once key/value heads are chosen


def axes(plan: CompressionPlan) -> dict[str, float]:
    """Return the plan's size along each axis."""
    values = {name: float(getattr(plan, name)) for name in DIMENSIONS if name != "num_attention_heads"}
    return {**values, QUERIES: plan.num_attention_heads / plan.num_key_value_heads}


def along(own: CompressionPlan, axis: str, size: float) -> dict[str, int]:
    """Return the dimensions of a cut of the base model's plan along one axis alone.

    Args:
        own: The plan of the base model itself.
        axis: The axis.
        size: The size along it.
    """
    if axis == QUERIES:
        return {"num_attention_heads": round(size * own.num_key_value_heads)}
    if axis == "num_key_value_heads":
        each = own.num_attention_heads // own.num_key_value_heads
        return {"num_key_value_heads": int(size), "num_attention_heads": int(size) * each}
    return {axis: int(size)}
