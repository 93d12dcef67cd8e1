"""Describe Qwen3 (dense): Llama with a norm per head on queries and keys.

https://github.com/huggingface/transformers, models/qwen3; arXiv 2505.09388.

attention_bias is refused: with it transformers has a bias on o_proj, and vLLM has none. Sliding windows (off in the
released models) and dual chunk attention are refused as for Qwen2.
"""

from __future__ import annotations

from compressors.model.family import Family

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    block_norms=("input_layernorm", "post_attention_layernorm"),
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    required={
        "attention_bias": (False,),
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "layer_types": ("full_attention",),
        "dual_chunk_attention_config": (None,),
        "is_causal": (True, None),
    },
)
