"""A checkpoint that has every tensor's shape and no weights."""

import json
import pathlib

from compressors.model import safetensors_file


def hollow(directory: pathlib.Path, config: dict, *, weights: bool = False) -> None:
    """Write a checkpoint whose weights are a hole in a file: zeros that take no disk space; or random weights."""
    import torch
    import transformers
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(directory), dtype=torch.bfloat16
        )
    tensors = {}
    for name, value in model.state_dict().items():
        if not (name == "lm_head.weight" and config["tie_word_embeddings"]):
            tensors[name] = value
    header = safetensors_file.header_of(tensors)
    size = sum(value.nbytes for value in tensors.values())
    if weights:
        torch.manual_seed(0)
        at = "cuda" if torch.cuda.is_available() else "cpu"
        drawn = {
            name: (0.02 * torch.randn(value.shape, dtype=torch.bfloat16, device=at)).cpu()
            for name, value in tensors.items()
        }
        norms = {name: torch.ones_like(value) for name, value in drawn.items() if "norm" in name}
        save_file({**drawn, **norms}, directory / "model.safetensors")
    else:
        with (directory / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
