"""Write a checkpoint with random weights and EXAONE-4.0-1.2B's exact dimensions, to time what real ones would take.

    python3 benchmarks/gpu/random_model.py DIRECTORY [--tokenizer DIRECTORY]

Sizes, from the model's config.json on the hub: 30 layers, hidden 2048, FFN 4096, 32 query and 8 key/value heads
of head_dim 64, vocabulary 102,400, tied embeddings, llama3 rope scaling: 1,279,391,488 parameters.
The tokenizer is copied from another model: only ids below its own vocabulary occur.
"""

import argparse
import pathlib
import shutil

import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    layers = 30
    config = transformers.Exaone4Config(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=65536,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        sliding_window=None,
        sliding_window_pattern=0,
        layer_types=["full_attention"] * layers,
        bos_token_id=1,
        eos_token_id=361,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e6,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.Exaone4ForCausalLM(config).to(torch.bfloat16)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    model.save_pretrained(arguments.directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(arguments.tokenizer / name, arguments.directory / name)


if __name__ == "__main__":
    main()
