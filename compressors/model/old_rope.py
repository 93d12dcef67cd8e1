"""Write the settings of the rotary embedding as transformers 4 reads them.

Checked against 4.57.3 itself: it computes the same angles as transformers 5 from what is written here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compressors.errors import CheckpointError
from compressors.model import rope

ORIGINAL = "original_max_position_embeddings"
# The keys of each rope_type that 4.57 computes with as 5.x does.
KNOWN: Mapping[str, frozenset[str]] = {
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", ORIGINAL}),
    "yarn": frozenset(
        {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", ORIGINAL, "truncate"}
    ),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", ORIGINAL}),
    "longrope": frozenset({"factor", "short_factor", "long_factor", "attention_factor", ORIGINAL}),
}
UNREAD = ("finetuned",)  # which no version computes with


def old_rope(config: Mapping[str, Any], version: str, way_out: str) -> dict[str, Any]:
    """Return the keys of a config.json for 4.x that set its rotary embedding; empty where `config` sets nothing.

    Args:
        config: The values of config.json, in either form.
        version: The version that is to read them.
        way_out: What to do where it can't express them.

    Raises:
        CheckpointError: Where 4.x can't express them, or they contradict each other.
    """
    if not config.keys() & {"rope_parameters", "rope_scaling", "rope_theta"}:
        return {}
    where = f"for transformers {version}: "
    new, old = _object(config, "rope_parameters", where), _object(config, "rope_scaling", where)
    rope.require_agreement(config, where)
    typed = rope.by_layer_type(config)
    nested = [name for settings in (new, old) for name, value in settings.items() if isinstance(value, Mapping)]
    if nested and (not typed or set(nested) - {rope.GLOBAL, rope.LOCAL} or new.keys() & set(nested) != set(nested)):
        raise CheckpointError(
            f"{where}the settings of the rotary embedding differ by the type of layer ({', '.join(nested)}), and for "
            f"{config.get('model_type')} it knows one rope_theta and one rope_scaling; {way_out}"
        )
    of_all = dict(new.get(rope.GLOBAL) or {}) if typed else dict(new)
    settings = {**of_all, **{key: value for key, value in old.items() if value is not None}}
    theta = settings.get("rope_theta", config.get("rope_theta"))
    scaling = _scaling(settings, config, where, way_out, nested=typed)
    keys: dict[str, Any] = {"rope_theta": rope.default_theta(config) if theta is None else theta}
    keys["rope_scaling"] = scaling
    if scaling is not None and scaling["rope_type"] == "longrope":
        keys[ORIGINAL] = scaling[ORIGINAL]  # 4.x looks for it next to rope_scaling
    if typed and nested:
        keys["rope_local_base_freq"] = _local_theta(new.get(rope.LOCAL) or {}, config, where, way_out)
    return keys


def _object(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    given = config.get(key) or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where}{key} is {given!r}; it must be an object")
    return given


def _local_theta(settings: Mapping[str, Any], config: Mapping[str, Any], where: str, way_out: str) -> float:
    """Return the rope_theta of layers with a sliding window, which 4.x can't scale."""
    if _scaling(settings, config, where, way_out, nested=True) is not None:
        raise CheckpointError(
            f"{where}rope_parameters.{rope.LOCAL} has rope_type: {rope.type_of(settings)}, and it scales the rotary "
            f"embedding of {rope.GLOBAL} alone; {way_out}"
        )
    theta = settings.get("rope_theta", config.get("rope_local_base_freq"))
    return rope.default_theta(config, local=True) if theta is None else theta


def _scaling(
    given: Mapping[str, Any], config: Mapping[str, Any], where: str, way_out: str, *, nested: bool
) -> dict[str, Any] | None:
    """Return 4.x's `rope_scaling` with its `rope_type`, or None where nothing is scaled."""
    other = ("rope_type", "type", "rope_theta", *UNREAD)
    values = {key: value for key, value in given.items() if key not in other and value is not None}
    rope_type = rope.type_of(given)
    if values.get("partial_rotary_factor") == 1:
        del values["partial_rotary_factor"]
    if rope_type == "proportional" and "partial_rotary_factor" not in values:  # the same as linear
        rope_type, values = "linear" if values.get("factor", 1) != 1 else "default", {"factor": 1, **values}
        if rope_type == "default":
            del values["factor"]
    if rope_type == "default" and set(values) <= {ORIGINAL}:
        return None
    if rope_type != "default" and rope_type not in KNOWN:
        raise CheckpointError(
            f"{where}rope_type {rope_type!r} can't be expressed; known are default, {', '.join(KNOWN)}; {way_out}"
        )
    if rope_type in ("yarn", "llama3", "longrope"):
        values = _with_original(values, rope_type, config, nested=nested)
    if nested and rope_type == "yarn":
        values.pop("truncate", None)  # transformers 5 doesn't read it there
    missing = sorted(rope.REQUIRED[rope_type] - values.keys())
    unknown = sorted(values.keys() - KNOWN.get(rope_type, frozenset()))
    if unknown or missing:
        reasons = [f"has no {', '.join(missing)}"] if missing else []
        reasons += [f"has {', '.join(unknown)}, which this version doesn't know"] if unknown else []
        raise CheckpointError(f"{where}the rotary embedding ({rope_type}) {' and '.join(reasons)}; {way_out}")
    return {"rope_type": rope_type, **values}


def _with_original(
    values: dict[str, Any], rope_type: str, config: Mapping[str, Any], *, nested: bool
) -> dict[str, Any]:
    """Return the settings with what 4.x derives from the length before scaling, or derives otherwise, written out."""
    longest = config.get("max_position_embeddings")
    outside = None if nested else config.get(ORIGINAL)
    original = values.get(ORIGINAL) or outside or longest
    if original is None:
        return values
    if outside is not None or rope_type != "yarn":  # yarn's default is the same in all versions
        values = {**values, ORIGINAL: original}
    if longest is None:
        return values
    ratio = longest / original
    if rope_type == "yarn" and "factor" not in values:
        values = {**values, "factor": ratio}
    if rope_type == "longrope" and values.get("factor", ratio) != ratio:
        # 4.x takes the ratio even where a factor is given
        factor = values["factor"]
        own = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        values = {"attention_factor": own, **values}
    return values
