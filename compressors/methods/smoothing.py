"""Smoothing: each input of a projection divided by a factor, and its weights multiplied by it, before a scheme rounds
both: the same model, whose inputs and weights have no channel that makes all others coarse.

SmoothQuant, Xiao et al., https://arxiv.org/abs/2211.10438, with factors in closed form. Symbols: W [N, K] the weights
of projections that read one input x [K], s [K] its factors. The step of a token's int8 grid is its largest |x_c| / s_c,
a row's its largest |W_nc| s_c. With sums of squares in place of the largest, what rounding either of them costs is

    E Σ_c x_c² / s_c²  ·  Σ_c s_c² ‖W_c‖²,    least (Cauchy and Schwarz) at    s_c² = √(E x_c²) / ‖W_c‖.

The factors are powers of two, so that nothing is rounded by them: in bfloat16 the model computes the same, bit for bit.
What divides x is what made it: the gains of the norm before q, k, v or gate, up; v's outputs for o, one factor for all
query heads that read it; up's outputs for down. Where projections read the residual stream itself (EXAONE 4) nothing
divides it, and they stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from compressors.methods.precision import Moments
from compressors.model.checkpoint import Checkpoint, LazyTensor
from compressors.model.family import Family, head_dim

VERSION = 1  # raised when the same model would be smoothed otherwise
MOST = 8  # factors are from 2⁻⁸ to 2⁸: float16 has no room for more, and rounds what they make very small

Factors = Callable[[], torch.Tensor]  # float32 [K], on the CPU


def smooth(checkpoint: Checkpoint, family: Family, moments: Moments) -> tuple[Checkpoint, Moments]:
    """(the same model with other weights, the second moments of its inputs); both are made when they are asked for.

    moments: module → E[x xᵀ] [K, K] of its input in `checkpoint`.
    """
    tensors = dict(checkpoint.tensors)
    found: dict[str, Factors] = {}  # by module, of its input

    def change(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if name in tensors:
            tensors[name] = tensors[name].map(function)

    for layer in range(int(checkpoint.config["num_hidden_layers"])):
        for parts in family.fused:
            modules = [family.in_layer(layer, part) for part in parts]
            norm, maker = family.input_norms.get(parts[0]), {family.o: family.v, family.down: family.up}.get(parts[0])
            shared = _shared(checkpoint, family) if parts[0] == family.o else (1, 1)
            factors: Factors = functools.cache(functools.partial(_of_input, checkpoint, modules, moments, *shared))
            if norm is not None:
                name, offset = f"{family.in_layer(layer, norm)}.weight", family.norm_offset
                change(name, functools.partial(_divided_gains, offset, factors))
                factors = functools.partial(_of_gains, checkpoint.tensors[name], offset, factors)
            elif maker is not None:
                for kind in ("weight", "bias"):
                    change(
                        f"{family.in_layer(layer, maker)}.{kind}", functools.partial(_divided_rows, factors, *shared)
                    )
            else:
                continue
            for module in modules:
                found[module] = factors
                change(f"{module}.weight", functools.partial(_multiplied_columns, factors))
    return dataclasses.replace(checkpoint, tensors=tensors), functools.partial(_of_smoothed, moments, found)


def best_factors(square: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The powers of two nearest to √(√square / √weights), about 1 in their geometric mean; float32 [K].

    square [K]: E x_c²; weights [K]: ‖W_c‖². An input that is always 0, or that no weight reads, has 1.
    """
    live = (square > 0) & (weights > 0)
    power = (torch.where(live, square, 1.0).double().log2() - torch.where(live, weights, 1.0).double().log2()) / 4
    power = (power - power[live].mean()).round().clamp(-MOST, MOST) if live.any() else power
    return torch.where(live, power.exp2(), 1.0).float()


def _shared(checkpoint: Checkpoint, family: Family) -> tuple[int, int]:
    """(query heads that read one value, head_dim)."""
    heads = int(checkpoint.config["num_attention_heads"])
    return heads // int(checkpoint.config.get("num_key_value_heads") or heads), head_dim(checkpoint.config)


def _of_input(checkpoint: Checkpoint, modules: list[str], moments: Moments, shared: int, size: int) -> torch.Tensor:
    """Of the input [K] of these modules; runs of `size` channels that share what they are made of, have the same."""
    square = moments(modules[0]).diagonal().float().cpu()
    weights = torch.zeros_like(square)
    for module in modules:
        weights += checkpoint.tensors[f"{module}.weight"].load().float().square().sum(0).cpu()
    square, weights = (x.reshape(-1, shared, size).sum(1).flatten() for x in (square, weights))
    factors = best_factors(square, weights).reshape(-1, 1, size)
    return factors.expand(-1, shared, size).flatten()


def _divided_rows(factors: Factors, shared: int, size: int, made: torch.Tensor) -> torch.Tensor:
    """The weight [N, K] or bias [N] of what makes an input; one of those that share stands for all."""
    each = factors().reshape(-1, shared, size)[:, 0].flatten().to(made.device)
    return (made.float() / each.reshape(-1, *[1] * (made.dim() - 1))).to(made.dtype)


def _multiplied_columns(factors: Factors, weight: torch.Tensor) -> torch.Tensor:
    return (weight.float() * factors().to(weight.device)).to(weight.dtype)


def _divided_gains(offset: float, factors: Factors, weight: torch.Tensor) -> torch.Tensor:
    """A norm's weight [K], whose gains are weight + offset."""
    gains = weight.float() + offset
    divided = (gains / factors().to(weight.device) - offset).to(weight.dtype)
    # a gain beside an offset that its dtype would round to nothing
    return torch.where((divided.float() + offset == 0) & (gains != 0), weight, divided)


def _of_gains(stored: LazyTensor, offset: float, factors: Factors) -> torch.Tensor:
    """What the gains were really divided by: beside an offset the dtype rounds them."""
    weight = stored.load()
    before, after = (x.float().cpu() + offset for x in (weight, _divided_gains(offset, factors, weight)))
    return torch.where(after == 0, 1.0, before / torch.where(after == 0, 1.0, after))


def _of_smoothed(moments: Moments, found: dict[str, Factors], module: str) -> torch.Tensor:
    moment = moments(module)
    if module not in found:
        return moment
    factors = found[module]().to(moment)
    return moment / factors[:, None] / factors
