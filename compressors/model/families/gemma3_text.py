"""Gemma 3, text alone (1B, 270M): norms before and after attention and MLP, and per head on queries and keys, all with
a gain of 1 + weight; an embedding that is multiplied by √hidden_size; five layers of six with a sliding window and
another rotary base. https://github.com/huggingface/transformers, models/gemma3; arXiv 2503.19786.

`layer_types` says which layers slide, or sliding_window_pattern where it isn't given; a depth cut carries each layer's
own. Scores are scaled by query_pre_attn_scalar, which no cut changes. Soft-capping, which vLLM's class reads in part
alone, biases and bidirectional attention are refused; the larger models (`gemma3`) hold a vision tower and are too.
"""

from __future__ import annotations

from compressors.model.family import Family

FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    block_norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    norm_offset=1.0,
    scaled_embedding=True,
    required={
        "attention_bias": (False,),
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
        "is_causal": (True, None),
        "layer_types": ("sliding_attention", "full_attention"),
    },
)
