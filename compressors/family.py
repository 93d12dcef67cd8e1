"""Family: where a model keeps its parts, and which config keys it understands. One family a file in `families/`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from compressors import families
from compressors.checkpoint import Checkpoint
from compressors.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Family:
    """Names are those of the modules in the stock transformers class; a weight is its module's name + `.weight`.

    block_norms: norms of a layer over the residual width, with hidden_size gains. head_norms: over head_dim.
    required: values that a config key must have where it is there, since another would mean another architecture.
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

    def weights(self, layers: int, tied: bool) -> set[str]:
        """The names of all weights that a model of this family has."""
        parts = (*self.linears, *self.block_norms, *self.head_norms)
        names = {self.in_layer(index, part) for index in range(layers) for part in parts}
        names |= {self.embedding, self.final_norm} | (set() if tied else {self.lm_head})
        return {f"{name}.weight" for name in names}


def names() -> list[str]:
    """The families there are: the files of `families/`."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint. Raises CheckpointError for one that is unknown, or not quite what its name says."""
    config = checkpoint.config
    model_type = str(config.get("model_type"))
    if model_type not in names():
        raise CheckpointError(
            f"architecture: model_type {model_type!r} is not known here; known are {', '.join(names())} "
            "(a family is one file in compressors/families)"
        )
    family: Family = importlib.import_module(f"compressors.families.{model_type}").FAMILY
    for key, allowed in family.required.items():
        if key in config and config[key] not in allowed:
            said = " or ".join(map(repr, allowed))
            raise CheckpointError(
                f"architecture: {key} is {config[key]!r}, and {model_type} is understood with {said} alone; this model "
                "can't be compressed without loss of meaning"
            )
    layers, tied = int(config["num_hidden_layers"]), bool(config.get("tie_word_embeddings", False))
    expected, found = family.weights(layers, tied), set(checkpoint.tensors)
    found.discard(f"{family.lm_head}.weight" if tied else "")
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing:
        raise CheckpointError(f"weights: {len(missing)} are missing, {missing[0]} first; the checkpoint is incomplete")
    if unknown:
        raise CheckpointError(
            f"weights: {len(unknown)} are not known to {model_type}, {unknown[0]} first; they would "
            "be lost, so this model is refused"
        )
    return family
