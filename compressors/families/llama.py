"""Llama: pre-norm; Llama 3.x, SmolLM2. https://github.com/huggingface/transformers, models/llama."""

from __future__ import annotations

from compressors.family import Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    block_norms=("input_layernorm", "post_attention_layernorm"),
    required={
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "hidden_act": ("silu",),
        "sliding_window": (None,),
        "pretraining_tp": (1, None),
    },
)
