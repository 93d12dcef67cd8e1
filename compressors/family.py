"""Family: where a model keeps its parts, and which config keys it understands. One family a file in `families/`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import torch

from compressors import families
from compressors.checkpoint import Checkpoint, stock_config
from compressors.errors import CheckpointError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DENSE = {"num_local_experts": (None, 0), "num_experts": (None, 0), "n_routed_experts": (None, 0)}  # no experts


@dataclasses.dataclass(frozen=True)
class Family:
    """Names are those of the modules in the stock transformers class; a weight is its module's name + `.weight`.

    block_norms: norms of a layer over the residual width, with hidden_size gains. head_norms: over head_dim.
    required: values that a config key must have, given or by the stock config's default, since another would mean
        another architecture; of a list, each entry. A key that the stock config doesn't know counts where it is there.
    per_layer: config keys that hold a list with one entry per layer.
    """

    model_type: str
    architecture: str
    block_norms: tuple[str, ...]
    head_norms: tuple[str, ...] = ()
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    required: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    per_layer: tuple[str, ...] = ("layer_types",)

    def layer(self, index: int) -> str:
        return f"{self.layers}.{index}"

    def in_layer(self, index: int, part: str) -> str:
        return f"{self.layers}.{index}.{part}"

    @property
    def linears(self) -> tuple[str, ...]:
        """The projections of a layer, which quantization takes."""
        return (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)

    @property
    def fused(self) -> tuple[tuple[str, ...], ...]:
        """Projections that vLLM runs as one matrix."""
        return ((self.q, self.k, self.v), (self.o,), (self.gate, self.up), (self.down,))

    def residual_norms(self, layers: int) -> list[str]:
        """Every norm over the residual width, the final one too."""
        return [self.in_layer(i, norm) for i in range(layers) for norm in self.block_norms] + [self.final_norm]

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """All weights that a model of this family with this stock config has: name → shape.

        E hidden size, H query heads, G key/value heads, D head_dim, F FFN width, V vocabulary.
        """
        E, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
        H, G = config.num_attention_heads, config.num_key_value_heads
        D = head_dim(config.to_dict())
        of_layer: dict[str, tuple[int, ...]] = {
            self.q: (H * D, E),
            self.k: (G * D, E),
            self.v: (G * D, E),
            self.o: (E, H * D),
            self.gate: (F, E),
            self.up: (F, E),
            self.down: (E, F),
            **dict.fromkeys(self.block_norms, (E,)),
            **dict.fromkeys(self.head_norms, (D,)),
        }
        layers = range(config.num_hidden_layers)
        found = {self.in_layer(layer, part): shape for layer in layers for part, shape in of_layer.items()}
        found |= {self.embedding: (V, E), self.final_norm: (E,)}
        if not config.tie_word_embeddings:
            found[self.lm_head] = (V, E)
        return {f"{name}.weight": shape for name, shape in found.items()}


def names() -> list[str]:
    """The families there are: the files of `families/`."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def head_dim(config: Mapping[str, Any]) -> int:
    """Of a config.json, which need not say it."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint.

    Raises CheckpointError for one that is unknown, or whose config or weights aren't quite what its name says.
    """
    config = checkpoint.config
    model_type = str(config.get("model_type"))
    if model_type not in names():
        raise CheckpointError(
            f"architecture: model_type {model_type!r} is not known here; known are {', '.join(names())} "
            "(a family is one file in compressors/families)"
        )
    family: Family = importlib.import_module(f"compressors.families.{model_type}").FAMILY
    stock = stock_config(config)
    for architecture in config.get("architectures") or [family.architecture]:
        if architecture != family.architecture:
            raise CheckpointError(
                f"architecture: config.json says {architecture}, and {model_type} is understood as "
                f"{family.architecture} alone; vLLM would load another model than transformers"
            )
    values = {**config, **stock.to_dict()}
    for key, allowed in {**DENSE, **family.required}.items():
        if key not in values:
            continue
        if any(value not in allowed for value in (values[key] if isinstance(values[key], list) else [values[key]])):
            said = " or ".join(map(repr, allowed))
            by_default = "" if key in config else " (config.json doesn't say, and it is transformers' default)"
            raise CheckpointError(
                f"architecture: {key} is {values[key]!r}{by_default}, and {model_type} is understood with {said} "
                "alone; this model can't be compressed without loss of meaning"
            )
    _check_weights(checkpoint, model_type, family.shapes(stock))
    return family


def _check_weights(checkpoint: Checkpoint, model_type: str, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Whether these weights are there, and no others: a plan is cut from shapes, before any weight is read."""
    missing, unknown = sorted(expected.keys() - checkpoint.tensors), sorted(checkpoint.tensors.keys() - expected)
    if missing:
        raise CheckpointError(f"weights: {len(missing)} are missing, {missing[0]} first; the checkpoint is incomplete")
    if unknown:
        raise CheckpointError(
            f"weights: {len(unknown)} are not known to {model_type}, {unknown[0]} first; they would be lost, so this "
            "model is refused"
        )
    for name, shape in expected.items():
        tensor = checkpoint.tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"weights: {name} is {' × '.join(map(str, tensor.shape))}, and config.json makes it "
                f"{' × '.join(map(str, shape))}; they belong to different models"
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"weights: {name} is {str(tensor.dtype).removeprefix('torch.')}; start from the unquantised model"
            )
