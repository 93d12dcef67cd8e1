"""Check the values of a config.json, and spell them as transformers does.

transformers refuses a wrong value with a message of its own, in the middle of a library. Here each refusal names the
key, its value and the rule.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from compressors.errors import CheckpointError
from compressors.model.rope import require_rope

DTYPES = ("float32", "float16", "bfloat16", "float64")
SPELLINGS = {  # other names of a dtype, as torch, mixed-precision trainers and other formats write them
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "double": "float64",
    "fp64": "float64",
}
SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
NUMBERS = (*SIZES, "vocab_size", "max_position_embeddings")
POSITIVE = ("rms_norm_eps", "query_pre_attn_scalar")
OPTIONAL = ("num_key_value_heads", "head_dim")  # for which null stands for a default
LAYER_TYPES = ("full_attention", "sliding_attention")
JSON_TYPES = {"int": "a whole number", "float": "a number with a decimal point", "bool": "true or false"}
JSON_TYPES |= {"str": "a text", "list": "a list", "dict": "an object", "NoneType": "null"}
MOST = 60  # characters of a value, and
QUOTED = 120  # of a message of transformers, that are shown


def refuse_quantized(config: Mapping[str, Any], before: str) -> None:
    """Refuse a model whose config.json says that its weights are quantized, by any method.

    Args:
        config: The values of config.json.
        before: The text that begins the message.

    Raises:
        CheckpointError: Naming the method.
    """
    for key in ("quantization_config", "compression_config"):
        given = config.get(key)
        if given == {}:
            raise CheckpointError(f"{before}config.json has an empty {key}, which no loader takes; remove it")
        if given:
            known = given if isinstance(given, dict) else {}
            bits = next((name for name in ("load_in_4bit", "load_in_8bit") if known.get(name)), None)
            how = known.get("quant_method") or bits or as_json(given).strip('"')
            raise CheckpointError(f"{before}is quantized already ({how}); start from the unquantized model")


def settled(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return the values of config.json in the spelling that stock loaders read; the given ones where nothing is odd.

    A dtype such as "torch.bfloat16" becomes "bfloat16", and "auto" is left out: the stored dtype takes its place. An
    EXAONE 4 without a sliding window gets its layer_types, which transformers can't derive.

    Args:
        config: The values of config.json.
        before: The text that begins the message of an error.

    Raises:
        CheckpointError: For a dtype that is unknown, or two that contradict each other.
    """
    stated_dtype(config, before)
    made = dict(config)
    for key in ("dtype", "torch_dtype"):
        if made.get(key) is not None:
            made[key] = _dtype(key, made[key])
            if made[key] is None:
                del made[key]
    if made.get("model_type") == "exaone4" and made.get("layer_types") is None and "sliding_window" in made:
        layers = made.get("num_hidden_layers")
        if made["sliding_window"] is None and type(layers) is int and 0 < layers < 10_000:
            made["layer_types"] = ["full_attention"] * layers
    return made


def stated_dtype(config: Mapping[str, Any], before: str = "") -> str | None:
    """Return the dtype that a config.json states, in torch's spelling; None where it leaves that to the weights.

    Raises:
        CheckpointError: For a dtype that is unknown, or two that contradict each other.
    """
    given = {key: _dtype(key, config[key], before) for key in ("dtype", "torch_dtype") if config.get(key) is not None}
    stated = {key: value for key, value in given.items() if value is not None}
    if len(set(stated.values())) > 1:
        told = " and ".join(f"{key}: {value}" for key, value in stated.items())
        raise CheckpointError(f"{before}config.json has {told}; remove the wrong key")
    return next(iter(stated.values()), None)


def _dtype(key: str, value: Any, before: str = "") -> str | None:
    """Return a dtype in torch's spelling, or None for auto."""
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    name = SPELLINGS.get(name, name)
    if value == "" or name == "auto":
        return None
    if name not in DTYPES:
        raise CheckpointError(
            f"{before}config.json has {key}: {as_json(value)}; write the dtype of the weights, one of "
            f"{', '.join(DTYPES)}"
        )
    return name


def as_json(value: Any) -> str:
    """Return a config's value as config.json spells it, cut to a length that a message can hold."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= MOST else f"{text[: MOST - 1]}…"


def require_values(config: Mapping[str, Any]) -> None:
    """Refuse values that no model can be made of.

    Raises:
        CheckpointError: Naming the key, its value and the rule.
    """
    for key in (*NUMBERS, *OPTIONAL):
        value = config.get(key)
        if key in config and not is_size(value) and not (key in OPTIONAL and value is None):
            raise CheckpointError(f"config.json has {key}: {as_json(value)}; {size_rule(key)}")
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise CheckpointError(
            f"config.json has num_key_value_heads: {kv_heads}, which does not divide num_attention_heads: {heads}; "
            "copy config.json again"
        )
    if (config.get("head_dim") or 0) % 2:
        raise CheckpointError(
            f"config.json has head_dim: {config['head_dim']}; the rotary embedding needs an even number"
        )
    padding, tokens = config.get("pad_token_id"), config.get("vocab_size")
    if type(padding) is int and tokens is not None and padding >= tokens:
        raise CheckpointError(
            f"config.json has pad_token_id: {padding}, and vocab_size: {tokens}; write a token of the vocabulary, or "
            "null"
        )
    for key in POSITIVE:
        value = config.get(key)
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise CheckpointError(f"config.json has {key}: {as_json(value)}; it must be a number above 0")
    for key in ("text_config", "per_layer_config"):
        if config.get(key):
            raise CheckpointError(
                f"config.json has {key}: {as_json(config[key])}, which {config.get('model_type')} models don't have; "
                "remove it, if the model is the same without"
            )
    _require_layer_types(config)
    require_rope(config)


def require_model_type(config: Mapping[str, Any]) -> None:
    """Refuse a config without a model_type, by which loaders choose the class.

    Raises:
        CheckpointError: Naming the key and its value.
    """
    if isinstance(config.get("model_type"), str) and config["model_type"]:
        return
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and architectures and isinstance(architectures[0], str)
    whose = f", that of {architectures[0]}" if named else ", such as llama"  # type: ignore[index]
    raise CheckpointError(
        f"config.json has model_type: {as_json(config.get('model_type'))}; write the name of an architecture{whose}"
    )


def size_rule(key: str) -> str:
    """Return what a size must be."""
    return f"it must be a whole number of 1 or more{', or null' if key in OPTIONAL else ''}"


def is_size(value: Any) -> bool:
    """Return whether a value is a whole number of 1 or more; true, an int to Python, is none."""
    return type(value) is int and value >= 1


def _require_layer_types(config: Mapping[str, Any]) -> None:
    """Refuse a list of layer types that is not one of the layers, and a pattern that transformers can't unfold."""
    layers, given = config.get("num_hidden_layers"), config.get("layer_types")
    rotary = config.get("no_rope_layers")
    if rotary is not None and not (
        isinstance(rotary, list) and len(rotary) == layers and all(type(entry) is int for entry in rotary)
    ):
        raise CheckpointError(
            f"config.json has no_rope_layers: {as_json(rotary)}; it must be a list of 1 (rotary) or 0 for each of the "
            f"{layers} layers"
        )
    if config.get("model_type") == "smollm3" and rotary is None and config.get("no_rope_layer_interval") == 0:
        raise CheckpointError("config.json has no_rope_layer_interval: 0 and no no_rope_layers; write one of them")
    if given is not None:
        if not isinstance(given, list) or any(entry not in LAYER_TYPES for entry in given):
            raise CheckpointError(
                f"config.json has layer_types: {as_json(given)}; it must be a list with {' or '.join(LAYER_TYPES)} "
                "for each layer"
            )
        if layers is not None and len(given) != layers:
            raise CheckpointError(
                f"config.json has {len(given)} layer_types, and num_hidden_layers: {layers}; write one for each layer"
            )
        windowed = config.get("model_type") == "gemma3_text" and LAYER_TYPES[1] in given
        if windowed and not is_size(config.get("sliding_window", 4096)):
            raise CheckpointError(
                f"config.json has layer_types with {LAYER_TYPES[1]}, and sliding_window: "
                f"{as_json(config.get('sliding_window'))}; write the number of tokens that such a layer sees"
            )
        return
    if config.get("model_type") not in ("exaone4", "gemma3_text"):
        return
    pattern, window = config.get("sliding_window_pattern", 4), config.get("sliding_window", 4096)
    if window is None or not is_size(pattern):
        raise CheckpointError(
            f"config.json has sliding_window_pattern: {as_json(pattern)} with sliding_window: {as_json(window)} and no "
            f"layer_types, and transformers can't derive them; write a list with {' or '.join(LAYER_TYPES)} for each "
            "layer"
        )


def refusal(config: Mapping[str, Any], error: Exception) -> str:
    """Return why transformers refuses a config, in a sentence that names the key and its value where they are known."""
    text = " ".join(str(error.__cause__ or error).split())
    field = re.search(r"[Ff]ield '(\w+)'", f"{error} {text}")
    model_type = config.get("model_type")
    if field and field[1] in config:
        wanted = dict.fromkeys(JSON_TYPES.get(name, name) for name in re.findall(r"expected (\w+), got", text))
        rule = f"it must be {' or '.join(wanted)}" if wanted else "correct it, or copy config.json again"
        return f"config.json has {field[1]}: {as_json(config[field[1]])}, which {model_type} models don't take; {rule}"
    if "multiple of the number of attention heads" in text:
        return (
            f"transformers refuses the config: The hidden size ({config.get('hidden_size')}) is not a multiple of the "
            f"number of attention heads ({config.get('num_attention_heads')})."
        )
    short = text if len(text) <= QUOTED else f"{text[: QUOTED - 1]}…"
    return (
        f"config.json is no {model_type} model's for transformers {importlib.metadata.version('transformers')} "
        f"({type(error).__name__}: {short}); correct the key in question, or copy config.json again"
    )
