"""Complete a stock transformers model that was created on `meta`, and imitate activation quantization in it."""

from __future__ import annotations

from typing import Any

import torch


def make_buffers(model: Any, config: Any, device: str) -> None:
    """Compute rotary frequencies and scales: they are no weights, so a model created on `meta` lacks them."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "scalar_embed_scale"):  # Gemma's embedding
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], type(module)(config).to(device))


def imitate_activations(linear: torch.nn.Module, scheme: str) -> None:
    """Round a Linear's input x [..., tokens, K] as the scheme's dynamic per-token quantization does."""

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0]
        largest = x.abs().amax(dim=-1, keepdim=True).float()
        if scheme == "W8A8":
            scale = (largest / 127.5).clamp_min(torch.finfo(torch.float32).tiny)
            rounded = (x / scale).round().clamp(-128, 127) * scale
        else:  # FP8_DYNAMIC
            scale = (largest / 448.0).clamp_min(torch.finfo(torch.float32).tiny)
            rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return (rounded.to(x.dtype), *args[1:])

    linear.register_forward_pre_hook(hook)
