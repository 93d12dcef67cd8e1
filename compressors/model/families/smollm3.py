"""SmolLM3: Llama without a rotary embedding in some layers, each fourth in the released model.
https://github.com/huggingface/transformers, models/smollm3.

`no_rope_layers` says which (1: rotary, 0: none); a depth cut carries each layer's own. Sliding windows (off in the
released model) and biases are refused. vLLM runs it through its transformers backend,
which has no place for the scales of an FP8 cache.
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
