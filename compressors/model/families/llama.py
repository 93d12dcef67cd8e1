"""Describe Llama: norms before attention and MLP.

The family of Llama 2 and 3.x, of SmolLM2, and of EXAONE 3.0 and 3.5, which are read as Llama
(`compressors.model.exaone3`). https://github.com/huggingface/transformers, models/llama.

The keys `qkv_bias`, `bias` and `is_causal` are read by vLLM's class and not by transformers'.
"""

from __future__ import annotations

from compressors.model.family import Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    block_norms=("input_layernorm", "post_attention_layernorm"),
    biases={
        **dict.fromkeys(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), "attention_bias"
        ),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "mlp_bias"),
    },
    required={
        "hidden_act": ("silu",),
        "sliding_window": (None,),
        "layer_types": ("full_attention", None),
        "pretraining_tp": (1, None),
        "qkv_bias": (None,),
        "bias": (False, None),
        "is_causal": (True, None),
    },
)
