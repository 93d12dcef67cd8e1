"""Describe Qwen2 and Qwen2.5: Llama with biases on queries, keys and values.

https://github.com/huggingface/transformers, models/qwen2; arXiv 2407.10671.

vLLM's class does not read head_dim: it divides hidden_size by the number of heads. A model whose cut changes that
quotient is written as the Llama that computes the same. It has attention_bias, and a zero bias on o_proj, where Llama
has one too. Sliding windows (off in the released models) are refused, and so is dual chunk attention, which only vLLM
knows.
"""

from __future__ import annotations

from compressors.model.family import Family, Recast

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    block_norms=("input_layernorm", "post_attention_layernorm"),
    biases=dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    required={
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "layer_types": ("full_attention",),
        "dual_chunk_attention_config": (None,),
        "qk_norm": (False, None),
        "is_causal": (True, None),
    },
    with_head_dim=Recast(
        model_type="llama",
        architecture="LlamaForCausalLM",
        config={"attention_bias": True, "mlp_bias": False},
        dropped=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        zero_biases=("self_attn.o_proj",),
    ),
)
