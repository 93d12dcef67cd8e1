"""Read EXAONE 3.0 and 3.5 as Llama: they compute the same under other names.

They are written as a Llama, which every version of vLLM and transformers loads. Stock transformers knows `exaone`
models only since 5.24 (https://github.com/huggingface/transformers, models/exaone) and runs its Llama class for them.
Before that, these models needed their own code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from compressors.errors import CheckpointError

MODEL_TYPE = "exaone"
VERSION = 1  # increase it when the same model would be written differently
ARCHITECTURES = ("ExaoneForCausalLM", "LlamaForCausalLM")  # the original name, and the one that transformers saves
KEYS = {  # EXAONE's names in config.json → Llama's
    "num_layers": "num_hidden_layers",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}
# Keys whose default differs between EXAONE's own code, stock transformers and Llama.
STATED = ("vocab_size", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act")
ROPE = ("rope_theta", "rope_parameters")
TENSORS = (
    (re.compile(r"^transformer\.wte\."), "model.embed_tokens."),
    (re.compile(r"^transformer\.ln_f\."), "model.norm."),
    (re.compile(r"^transformer\.h\.(\d+)\."), r"model.layers.\1."),
    (re.compile(r"\.ln_1\."), ".input_layernorm."),
    (re.compile(r"\.ln_2\."), ".post_attention_layernorm."),
    (re.compile(r"\.attn\.attention\.out_proj\."), ".self_attn.o_proj."),
    (re.compile(r"\.attn\.attention\."), ".self_attn."),
    (re.compile(r"\.mlp\.c_fc_0\."), ".mlp.gate_proj."),
    (re.compile(r"\.mlp\.c_fc_1\."), ".mlp.up_proj."),
    (re.compile(r"\.mlp\.c_proj\."), ".mlp.down_proj."),
)

Value = TypeVar("Value")


def is_exaone3(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of EXAONE 3.0 or 3.5."""
    return config.get("model_type") == MODEL_TYPE


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return an EXAONE 3 config.json as Llama's.

    Raises:
        CheckpointError: When it leaves out a key whose default differs between versions.
    """
    if any(name not in ARCHITECTURES for name in config.get("architectures") or ()):
        raise CheckpointError(
            f"architecture: config.json names {', '.join(map(str, config['architectures']))}, but {MODEL_TYPE} models "
            f"are read only as {' or '.join(ARCHITECTURES)}"
        )
    llama = {KEYS.get(key, key): value for key, value in config.items() if key != "auto_map"}
    missing = [key for key in STATED if llama.get(key) is None]
    if not any(llama.get(key) for key in ROPE):
        missing.append(ROPE[0])
    if missing:
        raise CheckpointError(
            f"architecture: config.json of an {MODEL_TYPE} model lacks {', '.join(missing)}, whose defaults differ "
            "between versions; add them to it"
        )
    return {**llama, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def llama_tensors(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Return the values of `tensors` under Llama's names for them."""
    return {_llama_name(name): value for name, value in tensors.items()}


def _llama_name(name: str) -> str:
    for pattern, replacement in TENSORS:
        name = pattern.sub(replacement, name)
    return name
