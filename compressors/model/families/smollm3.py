"""Describe SmolLM3: Llama without a rotary embedding in some layers, every fourth one in the released model.

https://github.com/huggingface/transformers, models/smollm3.

`no_rope_layers` has an entry per layer (1: rotary, 0: none); a depth cut keeps each layer's entry. Sliding windows
(off in the released model) and biases are refused. vLLM runs the model through its transformers backend, which can't
hold the scales of an FP8 cache.
"""

from __future__ import annotations

from compressors.model.family import Family

FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    block_norms=("input_layernorm", "post_attention_layernorm"),
    required={
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "layer_types": ("full_attention",),
    },
    per_layer=("no_rope_layers", "layer_types"),
    fp8_cache=False,
)
