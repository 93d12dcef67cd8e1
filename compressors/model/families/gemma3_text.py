"""Describe the text models of Gemma 3 (1B, 270M).

Norms stand before and after attention and MLP, and per head on queries and keys; all have a gain of 1 + weight. The
embedding is multiplied by √hidden_size. Five of six layers have a sliding window and their own rotary base.
https://github.com/huggingface/transformers, models/gemma3; arXiv 2503.19786.

`layer_types` says which layers have a sliding window, or sliding_window_pattern where it is missing; a depth cut keeps
each layer's type. Scores are scaled by query_pre_attn_scalar, which no cut changes. Refused are soft-capping, which
vLLM's class reads only in part, biases and bidirectional attention. The larger models (`gemma3`) contain a vision
tower and are refused too.
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
