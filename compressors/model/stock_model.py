"""Complete a stock transformers model that was created on `meta`, and imitate quantized Linears in it."""

from __future__ import annotations

from collections.abc import Mapping
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


class RoundedLinear(torch.nn.Module):
    """RoundedLinear is a Linear whose weight is integers times scales, of which the scales are parameters.

    Symbols: N output and K input width, g inputs that share a scale.
    """

    values: torch.Tensor

    def __init__(self, values: torch.Tensor, like: torch.nn.Linear, groups: int) -> None:
        """Take the integers [N, K] of a Linear on `meta`, with `groups` = K/g scales for each output, without values.

        Args:
            values: The integers, int8 [N, K].
            like: The Linear that it stands for.
            groups: The number of scales for each output.
        """
        super().__init__()
        self.register_buffer("values", values, persistent=False)
        self.weight_scale = torch.nn.Parameter(like.weight.new_empty(len(values), groups))
        self.bias = like.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output [..., N] for an input [..., K]."""
        made: torch.Tensor = _Product.apply(x, self.weight_scale, self.values)  # type: ignore[no-untyped-call]
        return made if self.bias is None else made + self.bias


class _Product(torch.autograd.Function):
    """x [..., K] times the weight's transpose; the weight is made again for the gradients and kept for neither."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, scales, values)
        return x @ _multiplied(values, scales).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, scales, values = ctx.saved_tensors
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)  # (N, K)
        of_scales = (of_weight * values).reshape(*scales.shape, -1).sum(-1)
        return gradient @ _multiplied(values, scales), of_scales, None


def _multiplied(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the weight [N, K] in the dtype of the scales [N, K/g]."""
    return (values.to(scales.dtype).reshape(*scales.shape, -1) * scales[..., None]).reshape(values.shape)


def with_values(model: torch.nn.Module, values: Mapping[str, torch.Tensor], groups: Mapping[str, int]) -> None:
    """Replace Linears of a model on `meta` by a RoundedLinear.

    Args:
        model: The model.
        values: The integers, int8 [N, K], by module name.
        groups: The number of scales for each output, by module name.
    """
    for name, its in values.items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        setattr(model.get_submodule(parent), child, RoundedLinear(its, linear, groups[name]))


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
