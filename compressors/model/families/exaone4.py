"""Describe EXAONE 4.0: norms after attention and MLP instead of before them, and one per head on queries and keys.

https://github.com/huggingface/transformers, models/exaone4; arXiv 2507.11407. The 1.2B model has full attention in
every layer. The 32B model's sliding windows follow a layer pattern that a depth cut would break, so it is refused.
"""

from __future__ import annotations

from compressors.model.family import Family

FAMILY = Family(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    block_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    required={
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "hidden_act": ("silu",),
        "sliding_window": (None,),
        "layer_types": ("full_attention",),
    },
)
