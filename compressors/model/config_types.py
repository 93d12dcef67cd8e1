"""Check the types of the values of config.json and tokenizer_config.json that this package or transformers uses.

JSON from elsewhere may hold any type under a key. A wrong one is named here, before some library trips over it.
"""

from __future__ import annotations

import math
import pkgutil
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from compressors.errors import CheckpointError
from compressors.model import exaone3, families
from compressors.model.model_directory import require_json

FAMILIES = families.__path__
TOKENIZER_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
MOST = 10**15  # a larger whole number is no size

MOST_PATTERN = 500  # characters of a pattern of module names
MOST_REPEATS = 6  # in it: names have about 50 characters, and each repeat may try all of them
REPEATED_GROUP, REPEAT = re.compile(r"\)[*+{]"), re.compile(r"[*+{]")

Check = Callable[[Any], bool]


def _whole(least: int) -> Check:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _any_of(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _dtype(value: Any) -> bool:
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    return name == "auto" or isinstance(getattr(torch, name, None), torch.dtype)


def _rope(value: Any) -> bool:
    """Accept names, numbers and lists of numbers, and one such object for each type of layer."""
    if not isinstance(value, dict):
        return False
    plain = _any_of(_number, _flag, _list_of(_number))
    for key, entry in value.items():
        named = _text(entry) if key in ("rope_type", "type") else plain(entry)
        if entry is not None and not named and not (isinstance(entry, dict) and _rope(entry)):
            return False
    return True


def _patterns(value: Any) -> bool:
    """Accept names of modules, and `re:` with a pattern that no name can keep busy: no repeated group, few repeats."""
    if not _list_of(_text)(value):
        return False
    return all(
        len(name) <= MOST_PATTERN and not REPEATED_GROUP.search(name) and len(REPEAT.findall(name)) <= MOST_REPEATS
        for name in value
        if name.startswith("re:")
    )


SIZE = (_whole(1), "a whole number of 1 or more")
COUNT = (_whole(0), "a whole number of 0 or more")
TOKEN_ID = (_any_of(_whole(-1), _list_of(_whole(0))), "the number of a token")
NUMBER = (_number, "a finite number")
TEXT = (_text, "a string")
FLAG = (_flag, "true or false")
OBJECT = (_object, "an object")
NAMES = (_list_of(_text), "a list of strings")
DTYPE = (_dtype, "a dtype of torch, such as bfloat16")
ROPE = (_rope, "an object of names and numbers")
TOKEN = (_any_of(_text, _object), "a string or an object")
TOKENS = (_list_of(_any_of(_text, _object)), "a list of tokens")

Rules = Mapping[str, tuple[Check, str]]

# Null counts as missing for every key.
EVERY_MODEL: Rules = {"quantization_config": OBJECT}
CONFIG: Rules = {
    **EVERY_MODEL,
    **dict.fromkeys(("vocab_size", "num_key_value_heads", "head_dim", "max_position_embeddings"), SIZE),
    **dict.fromkeys(("sliding_window", "no_rope_layer_interval", "max_window_layers", "num_local_experts"), COUNT),
    "sliding_window_pattern": (_any_of(_whole(0), _text), "a whole number or a string"),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKEN_ID),
    **dict.fromkeys(
        (
            *("rms_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_local_base_freq", "initializer_range"),
            *("attention_dropout", "query_pre_attn_scalar", "logit_scale", "partial_rotary_factor"),
            *("attn_logit_softcapping", "final_logit_softcapping", "pretraining_tp"),
        ),
        NUMBER,
    ),
    **dict.fromkeys(("model_type", "hidden_act", "hidden_activation", "activation_function"), TEXT),
    "transformers_version": TEXT,
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache", "use_sliding_window", "is_decoder"), FLAG
    ),
    **dict.fromkeys(("architectures", "layer_types"), NAMES),
    "no_rope_layers": (_list_of(_any_of(_whole(0), _flag)), "a list of 0 and 1"),
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), ROPE),
    **dict.fromkeys(("text_config", "per_layer_config"), OBJECT),
}
# The keys that `config_values` checks, and spells, with more that must be true of them.
LEFT_TO_VALUES = (
    *("vocab_size", "num_key_value_heads", "head_dim", "max_position_embeddings", "dtype", "torch_dtype"),
    *("layer_types", "no_rope_layers", "text_config", "per_layer_config", "sliding_window_pattern"),
    *("rope_parameters", "rope_scaling", "rope_theta", "rms_norm_eps", "query_pre_attn_scalar"),
    *("architectures", "bos_token_id", "eos_token_id", "pad_token_id"),
)
QUANTIZATION: Rules = {
    **dict.fromkeys(("quant_method", "format"), TEXT),
    "config_groups": (_any_of(_object, _list_of(_object)), "an object of groups"),
    "ignore": (_patterns, "a list of names and simple patterns"),
    "kv_cache_scheme": OBJECT,
    "bits": SIZE,
}
GROUP: Rules = {
    "targets": (_any_of(_text, _patterns), "a list of names and simple patterns"),
    **dict.fromkeys(("input_activations", "output_activations"), OBJECT),
    "weights": OBJECT,
    "format": TEXT,
}
WEIGHTS: Rules = {"num_bits": SIZE, "group_size": (_whole(-1), "a whole number"), "strategy": TEXT, "symmetric": FLAG}
TOKENIZER: Rules = {
    "model_max_length": (lambda value: _number(value) and value > 0, "a number above 0"),
    **dict.fromkeys(("tokenizer_class", "name_or_path", "backend"), TEXT),
    **dict.fromkeys(
        ("padding_side", "truncation_side"), (lambda value: value in ("left", "right"), '"left" or "right"')
    ),
    **dict.fromkeys(
        (f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")),
        TOKEN,
    ),
    **dict.fromkeys(
        (
            *("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "do_lower_case"),
            *("legacy", "split_special_tokens"),
        ),
        FLAG,
    ),
    "additional_special_tokens": TOKENS,
    "extra_special_tokens": (_any_of(_object, TOKENS[0]), "a list or an object of tokens"),
    "model_specific_special_tokens": OBJECT,
    "added_tokens_decoder": (
        lambda value: isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values()),
        "an object of tokens",
    ),
    "model_input_names": NAMES,
    "chat_template": (_any_of(_text, _object, _list_of(_object)), "a string"),
}


def require_config(path: Path, config: Mapping[str, Any], left_out: Collection[str] = ()) -> None:
    """Check the values of a config.json; of an unknown family only those that mean the same in all.

    Args:
        path: The model's directory.
        config: The values.
        left_out: Keys that are checked elsewhere.

    Raises:
        CheckpointError: When a value has a wrong type.
    """
    known = str(config.get("model_type")) in (exaone3.MODEL_TYPE, *(m.name for m in pkgutil.iter_modules(FAMILIES)))
    rules = {key: rule for key, rule in (CONFIG if known else EVERY_MODEL).items() if key not in left_out}
    wrong = first_wrong(config, rules) or _wrong_in_quantization(config)
    if wrong is not None:
        raise CheckpointError(f"model {path}: config.json has {wrong}")


def require_tokenizer_files(path: Path, names: Iterable[str]) -> None:
    """Check that the small JSON files of a tokenizer hold objects, with values of the right types.

    Args:
        path: The model's directory.
        names: The names of its files.

    Raises:
        CheckpointError: When one can't be read, or a value has a wrong type.
    """
    for name in (name for name in TOKENIZER_OBJECTS if name in names):
        wrong = first_wrong(require_json(path / name, "copy it there"), TOKENIZER)
        if wrong is not None:
            raise CheckpointError(f"model {path}: {name} has {wrong}")


def first_wrong(values: Mapping[str, Any], rules: Rules) -> str | None:
    """Return the first key whose value breaks its rule, with the value and the rule; None where all are right."""
    for key, (check, rule) in rules.items():
        value = values.get(key)
        if value is not None and not check(value):
            return f"{key}: {ascii(value)[:60]}; it must be {rule}"
    return None


def _wrong_in_quantization(config: Mapping[str, Any]) -> str | None:
    quantization = config.get("quantization_config") or {}
    groups = quantization.get("config_groups")
    wrong = first_wrong(quantization, QUANTIZATION)
    for name, group in groups.items() if wrong is None and isinstance(groups, dict) else ():
        if isinstance(group, dict):
            wrong = wrong or first_wrong(group, GROUP)
            wrong = wrong or first_wrong(group.get("weights") or {}, WEIGHTS)
        elif not isinstance(group, list | str):  # the layers of a preset
            wrong = wrong or f"{ascii(name)[1:-1][:60]}: {ascii(group)[:60]}; it must be an object"
    return None if wrong is None else f"quantization_config with {wrong}"
