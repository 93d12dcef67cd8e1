"""Models and texts that are the same on every machine, for every version of Python, torch and transformers.

Weights are small integers times powers of two, so that bfloat16 holds them exactly; the tokenizer is bytes; config.json
is written by hand. So the digests of these models never change.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHARED: dict[str, Any] = {
    "vocab_size": 272,
    "num_hidden_layers": 4,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "dtype": "bfloat16",
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    "exaone4": (
        "Exaone4ForCausalLM",
        {
            "rope_parameters": LLAMA3,
            "sliding_window": None,
            "sliding_window_pattern": 0,
            "layer_types": ["full_attention"] * 4,
        },
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "hidden_size": 192},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 200000.0}}),
    "smollm3": (
        "SmolLM3ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 30000.0}, "no_rope_layers": [1, 0, 1, 1]},
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
            "sliding_window": 11,
            "query_pre_attn_scalar": 40,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
}
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu", "an", "el", "is")


def write_model(path: Path, family: str) -> Path:
    """A model of `family` in `path`."""
    architecture, changes = FAMILIES[family]
    config = {**SHARED, **changes, "model_type": family, "architectures": [architecture]}
    if family == "qwen2":
        del config["head_dim"]  # it is hidden_size / num_attention_heads
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    stock = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(stock)
    tensors = {
        name: _weights(name, tuple(tensor.shape), family)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    _tokenizer().save_pretrained(path)
    return path


def _weights(name: str, shape: tuple[int, ...], family: str) -> torch.Tensor:
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if "norm" in name:
        whole = random.randint(-32, 64, size=shape) / 128 + (0.0 if family == "gemma3_text" else 1.0)
    elif name.endswith(".bias"):
        whole = random.randint(-64, 65, size=shape) / 256
    else:
        whole = random.randint(-127, 128, size=shape) / 512
    return torch.from_numpy(whole).to(torch.bfloat16)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["[BOS]", "[EOS]", "[PAD]"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="[BOS]", eos_token="[EOS]", pad_token="[PAD]", model_max_length=512
    )


def write_text(path: Path, seed: int, paragraphs: int = 60) -> Path:
    """Paragraphs of invented words."""
    random = np.random.RandomState(seed)
    lines = []
    for _ in range(paragraphs):
        words = []
        for _ in range(random.randint(20, 40)):
            words.append("".join(SYLLABLES[i] for i in random.randint(0, len(SYLLABLES), size=random.randint(1, 4))))
        lines.append(" ".join(words).capitalize() + ".")
    path.write_text("\n\n".join(lines))
    return path
