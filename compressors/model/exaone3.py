"""EXAONE 3.0 and 3.5, read as the Llama that they are: other names, the same arithmetic.

What is written is a Llama, which every vLLM and transformers loads; of an `exaone` model stock transformers knows since
5.24 alone (https://github.com/huggingface/transformers, models/exaone), which runs its Llama class for it, and before
that it needed the model's own code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from compressors.errors import CheckpointError

MODEL_TYPE = "exaone"
VERSION = 1  # raised when the same model would be written otherwise
ARCHITECTURES = ("ExaoneForCausalLM", "LlamaForCausalLM")  # as it was made, and as transformers saves it
KEYS = {  # its own names in config.json
    "num_layers": "num_hidden_layers",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}
# What its own code and stock transformers have different defaults for, or Llama another one.
SAID = ("vocab_size", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act")
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
    return config.get("model_type") == MODEL_TYPE


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its config.json as Llama's. Raises CheckpointError for one that leaves to a default what has several."""
    if any(name not in ARCHITECTURES for name in config.get("architectures") or ()):
        raise CheckpointError(
            f"architecture: config.json says {', '.join(map(str, config['architectures']))}, and {MODEL_TYPE} is "
            f"understood as {' or '.join(ARCHITECTURES)} alone"
        )
    made = {KEYS.get(key, key): value for key, value in config.items() if key != "auto_map"}
    missing = [key for key in SAID if made.get(key) is None]
    if not any(made.get(key) for key in ROPE):
        missing.append(ROPE[0])
    if missing:
        raise CheckpointError(
            f"architecture: config.json of an {MODEL_TYPE} model says no {', '.join(missing)}, and its defaults differ "
            "between versions; write them there"
        )
    return {**made, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def llama_tensors(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The same by Llama's names."""
    return {_llama_name(name): value for name, value in tensors.items()}


def _llama_name(name: str) -> str:
    for pattern, its in TENSORS:
        name = pattern.sub(its, name)
    return name
