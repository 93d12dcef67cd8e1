"""Read the settings of the rotary embedding in a config.json, and refuse those that no model can be computed with.

transformers 5 writes them as `rope_parameters`, for Gemma 3 once per type of layer. 4.x writes `rope_theta`,
`rope_scaling` and, for Gemma 3, `rope_local_base_freq`. Both are read, also together, as long as they agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compressors.errors import CheckpointError

GLOBAL, LOCAL = "full_attention", "sliding_attention"  # the types of layers that have a rotary embedding of their own
DEFAULT_THETA = 10_000.0  # for a config without rope_theta whose class has no default of its own
REQUIRED: Mapping[str, frozenset[str]] = {  # the keys of each rope_type that have no default
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "longrope": frozenset({"short_factor", "long_factor"}),
    "proportional": frozenset(),
}
NULL_FACTOR = ("yarn", "longrope")  # which take max_position_embeddings / original_max_position_embeddings instead
NUMBERS = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "partial_rotary_factor",
)
LISTS = ("short_factor", "long_factor")


def by_layer_type(config: Mapping[str, Any]) -> bool:
    """Return whether the model's class has a rotary embedding for each type of layer, as Gemma 3's."""
    return isinstance(_default_theta(config), Mapping)


def default_theta(config: Mapping[str, Any], *, local: bool = False) -> float:
    """Return the rope_theta that transformers takes where config.json has none; `local`: that of sliding layers."""
    theta = _default_theta(config)
    if isinstance(theta, Mapping):
        theta = theta.get("local" if local else "global", DEFAULT_THETA)
    return float(theta)


def _default_theta(config: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        return DEFAULT_THETA
    return getattr(CONFIG_MAPPING[model_type], "default_theta", DEFAULT_THETA)


def type_of(settings: Mapping[str, Any]) -> str:
    """Return the rope_type of one rotary embedding's settings, which older files call type."""
    return str(settings.get("rope_type") or settings.get("type") or "default")


def require_rope(config: Mapping[str, Any]) -> None:
    """Refuse settings of the rotary embedding that are unknown, incomplete, or contradict each other.

    Raises:
        CheckpointError: Naming the key, its value and what to write.
    """
    given = {key: config.get(key) for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None}
    for key, settings in given.items():
        if not isinstance(settings, Mapping):
            raise CheckpointError(f"config.json has {key}: {settings!r}; it must be an object, or null")
        nested = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
        if nested and (key == "rope_scaling" or not by_layer_type(config) or nested.keys() - {GLOBAL, LOCAL}):
            typed = key == "rope_parameters" and by_layer_type(config)
            raise CheckpointError(
                f"config.json has {key} by the type of layer ({', '.join(map(str, nested))}), which "
                f"{config.get('model_type')} models don't have; write "
                f"{f'{GLOBAL} and {LOCAL} alone' if typed else 'one object without them'}"
            )
        if settings and not nested and key == "rope_parameters" and by_layer_type(config):
            raise CheckpointError(
                f"config.json has rope_parameters without {GLOBAL} and {LOCAL}, and transformers reads nothing else "
                f"for {config.get('model_type')}; write an object for each of them"
            )
        for name, value in nested.items() or {"": settings}.items():
            _require_one(f"{key}.{name}" if name else key, value, config)
    for key in ("rope_theta", "rope_local_base_freq"):
        if config.get(key) is not None:
            _require_number(key, "", config[key])
    require_agreement(config)


def _require_one(where: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Check the settings of one rotary embedding."""
    old, new = settings.get("type"), settings.get("rope_type")
    if old and new and old != new:
        raise CheckpointError(f"config.json has rope_type: {new} and type: {old} in {where}; remove the wrong one")
    rope_type = type_of(settings)
    if rope_type not in REQUIRED:
        raise CheckpointError(
            f"config.json has rope_type: {rope_type} in {where}, which transformers doesn't know; known are "
            f"{', '.join(REQUIRED)}"
        )
    for key in sorted(REQUIRED[rope_type]):
        if settings.get(key) is None and not (key == "factor" and key in settings and rope_type in NULL_FACTOR):
            raise CheckpointError(f"config.json has no {key} in {where}, which {rope_type} needs; add it")
    for key in NUMBERS:
        if settings.get(key) is not None or key == "rope_theta" in settings:
            _require_number(key, f" in {where}", settings.get(key))
    if rope_type != "proportional" and settings.get("partial_rotary_factor") not in (None, 1):
        raise CheckpointError(
            f"config.json has partial_rotary_factor: {settings['partial_rotary_factor']} in {where}, and "
            f"{config.get('model_type')} models rotate whole heads; remove it"
        )
    if rope_type == "longrope":
        _require_factors(where, settings, config)


def _require_number(key: str, where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json has {key}: {value!r}{where}; it must be a number above 0")


def _require_factors(where: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Check the lists of longrope: a number for each pair of a head's dimensions."""
    pairs = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) // 2
    for key in LISTS:
        factors = settings[key]
        if not isinstance(factors, list) or len(factors) != pairs:
            found = f"{len(factors)} numbers" if isinstance(factors, list) else repr(factors)
            raise CheckpointError(
                f"config.json has {found} as {key} in {where}; it must be a list of {pairs} numbers, half of head_dim"
            )
        for factor in factors:
            _require_number(f"a {key}", f" in {where}", factor)


def require_agreement(config: Mapping[str, Any], before: str = "") -> None:
    """Refuse a key that is written twice with different values, since versions differ in which one they read.

    Args:
        config: The values of config.json.
        before: The text that begins the message.

    Raises:
        CheckpointError: Naming both keys and values.
    """
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if old.get("type") and not old.get("rope_type") and by_layer_type(config):
        raise CheckpointError(
            f"{before}config.json has type: {old['type']} in rope_scaling and no rope_type, and versions differ in "
            f"whether they read that for {config.get('model_type')}; write rope_type instead of type"
        )
    inner, outer = new.get(GLOBAL, new), f"rope_parameters.{GLOBAL}" if GLOBAL in new else "rope_parameters"
    stated: list[dict[str, Any]] = [{}, {}, {}, {}]
    for key, settings in ((outer, inner or {}), ("rope_scaling", old)):
        if settings:
            stated[0][key] = {k: v for k, v in settings.items() if k not in ("rope_theta", "type") and v is not None}
            stated[0][key] |= {"rope_type": type_of(settings)}
        for number, name in enumerate(("rope_theta", "original_max_position_embeddings"), 1):
            if settings.get(name) is not None:
                stated[number][f"{key}.{name}"] = settings[name]
    if isinstance(new.get(LOCAL), Mapping) and new[LOCAL].get("rope_theta") is not None:
        stated[3][f"rope_parameters.{LOCAL}.rope_theta"] = new[LOCAL]["rope_theta"]
    for number, name in ((1, "rope_theta"), (2, "original_max_position_embeddings"), (3, "rope_local_base_freq")):
        if config.get(name) is not None:
            stated[number][name] = config[name]
    for values in stated:
        if any(value != next(iter(values.values())) for value in values.values()):
            told = ", ".join(f"{key}: {value}" for key, value in values.items())
            raise CheckpointError(f"{before}config.json contradicts itself ({told}); remove the wrong key")
