"""Smooth a model before rounding: divide each input of a projection by a factor, and multiply its weights by it.

The model computes the same, but no channel of inputs or weights makes the rounding of all others coarse.

SmoothQuant, Xiao et al., https://arxiv.org/abs/2211.10438, with factors in closed form. Symbols: W [N, K] the weights
of projections that read one input x [K], s [K] its factors. The step of a token's int8 grid is proportional to its
largest |x_c| / s_c, and that of a row to its largest |W_nc| s_c. With sums of squares in place of the largest values,
rounding either of them costs

    E Σ_c x_c² / s_c²  ·  Σ_c s_c² ‖W_c‖²,    least (Cauchy and Schwarz) at    s_c² = √(E x_c²) / ‖W_c‖.

The factors are powers of two, so they round nothing: in bfloat16 the model computes the same, bit for bit.

What produces x is divided: the gains of the norm before q, k, v or gate, up, the outputs of v for o, and those of up
for down. All query heads that read one value head share its factors. Projections that read the residual stream itself
(EXAONE 4) stay unchanged, since nothing could be divided.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from compressors.model.checkpoint import Checkpoint, LazyTensor
from compressors.model.family import Family, head_dim
from compressors.statistics.second_moments import InputMoment

VERSION = 1  # increase it when the same model would be smoothed differently
MOST = 8  # factors are from 2⁻⁸ to 2⁸: float16 would overflow or round small results with more

Factors = Callable[[], torch.Tensor]  # float32 [K], on the CPU


def smooth(checkpoint: Checkpoint, family: Family, moments: InputMoment) -> tuple[Checkpoint, InputMoment]:
    """Return the smoothed checkpoint and the second moments of its inputs; both are computed when they are asked for.

    Args:
        checkpoint: The model.
        family: Its family.
        moments: A function from a module's name to E[x xᵀ] [K, K] of its input in `checkpoint`.
    """
    tensors = dict(checkpoint.tensors)
    factors_of: dict[str, Factors] = {}  # by module, for its input

    def change(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if name in tensors:
            tensors[name] = tensors[name].map(function)

    for layer in range(int(checkpoint.config["num_hidden_layers"])):
        for parts in family.fused:
            modules = [family.in_layer(layer, part) for part in parts]
            norm, producer = (
                family.input_norms.get(parts[0]),
                {family.o: family.v, family.down: family.up}.get(parts[0]),
            )
            shared = _shared(checkpoint, family) if parts[0] == family.o else (1, 1)
            factors: Factors = functools.cache(functools.partial(_of_input, checkpoint, modules, moments, *shared))
            if norm is not None:
                name, offset = f"{family.in_layer(layer, norm)}.weight", family.norm_offset
                change(name, functools.partial(_divided_gains, offset, factors))
                factors = functools.partial(_of_gains, checkpoint.tensors[name], offset, factors)
            elif producer is not None:
                for kind in ("weight", "bias"):
                    change(
                        f"{family.in_layer(layer, producer)}.{kind}", functools.partial(_divided_rows, factors, *shared)
                    )
            else:
                continue
            for module in modules:
                factors_of[module] = factors
                change(f"{module}.weight", functools.partial(_multiplied_columns, factors))
    return dataclasses.replace(checkpoint, tensors=tensors), functools.partial(_of_smoothed, moments, factors_of)


def best_factors(square: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the powers of two nearest to √(√square / √weights), with a geometric mean of about 1; float32 [K].

    Args:
        square: E x_c² [K].
        weights: ‖W_c‖² [K].

    Returns:
        The factors; 1 for an input that is always 0 or that no weight reads.
    """
    live = (square > 0) & (weights > 0)
    power = (torch.where(live, square, 1.0).double().log2() - torch.where(live, weights, 1.0).double().log2()) / 4
    power = (power - power[live].mean()).round().clamp(-MOST, MOST) if live.any() else power
    return torch.where(live, power.exp2(), 1.0).float()


def _shared(checkpoint: Checkpoint, family: Family) -> tuple[int, int]:
    """Return (the query heads that read one value head, head_dim)."""
    heads = int(checkpoint.config["num_attention_heads"])
    return heads // int(checkpoint.config.get("num_key_value_heads") or heads), head_dim(checkpoint.config)


def _of_input(checkpoint: Checkpoint, modules: list[str], moments: InputMoment, shared: int, size: int) -> torch.Tensor:
    """Return the factors of the input [K] of these modules.

    Runs of `size` channels that share what they are computed from have the same factors, `shared` runs each.
    """
    square = moments(modules[0]).diagonal().float()
    weights = torch.zeros_like(square)
    for module in modules:
        weights += checkpoint.tensors[f"{module}.weight"].load().to(square.device).float().square().sum(0)
    square, weights = (x.reshape(-1, shared, size).sum(1).flatten() for x in (square, weights))
    factors = best_factors(square, weights).reshape(-1, 1, size)
    return factors.expand(-1, shared, size).flatten().cpu()


def _divided_rows(factors: Factors, shared: int, size: int, tensor: torch.Tensor) -> torch.Tensor:
    """Divide the weight [N, K] or bias [N] of what produces an input; runs that share factors are divided once."""
    each = factors().reshape(-1, shared, size)[:, 0].flatten().to(tensor.device)
    return (tensor.float() / each.reshape(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)


def _multiplied_columns(factors: Factors, weight: torch.Tensor) -> torch.Tensor:
    return (weight.float() * factors().to(weight.device)).to(weight.dtype)


def _divided_gains(offset: float, factors: Factors, weight: torch.Tensor) -> torch.Tensor:
    """Divide the gains of a norm, which are its weight [K] + offset."""
    gains = weight.float() + offset
    divided = (gains / factors().to(weight.device) - offset).to(weight.dtype)
    # keep a gain whose quotient the dtype would round to exactly -offset, that is to a gain of 0
    return torch.where((divided.float() + offset == 0) & (gains != 0), weight, divided)


def _of_gains(stored: LazyTensor, offset: float, factors: Factors) -> torch.Tensor:
    """Return what the gains were really divided by: with an offset the dtype rounds them."""
    weight = stored.load()
    before, after = (x.float().cpu() + offset for x in (weight, _divided_gains(offset, factors, weight)))
    return torch.where(after == 0, 1.0, before / torch.where(after == 0, 1.0, after))


def _of_smoothed(moments: InputMoment, factors_of: dict[str, Factors], module: str) -> torch.Tensor:
    moment = moments(module)
    if module not in factors_of:
        return moment
    factors = factors_of[module]().to(moment)
    return moment / factors[:, None] / factors
