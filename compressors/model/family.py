"""Family: where a model keeps its parts, and which config keys it understands. One family a file in `families/`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import torch

from compressors.errors import CheckpointError
from compressors.model import families
from compressors.model.checkpoint import Checkpoint, LazyTensor, foreign, stock_config

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REQUIRED = {  # of every family: no experts, and no factor of the logits, which vLLM reads and transformers doesn't
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "logit_scale": (None, 1.0),
}


@dataclasses.dataclass(frozen=True)
class Recast:
    """Another stock architecture that computes the same with the same weights under the same names.

    config: what its config.json says beside. dropped: keys that it doesn't know.
    zero_biases: projections that have a bias there and none here.
    """

    model_type: str
    architecture: str
    config: Mapping[str, Any]
    dropped: tuple[str, ...]
    zero_biases: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """Names are those of the modules in the stock transformers class; a weight is its module's name + `.weight`.

    block_norms: norms of a layer over the residual width, with hidden_size gains. head_norms: over head_dim.
    norm_offset: what a norm adds to its weight: its gain is weight + norm_offset.
    scaled_embedding: whether what is read from the embedding is multiplied by √hidden_size.
    biases: projection → the config key that gives it a bias; None: it always has one.
    required: values that a config key must have, given or by the stock config's default, since another would mean
        another architecture; of a list, each entry. A key that the stock config doesn't know counts where it is there.
    per_layer: config keys that hold a list with one entry per layer, given or by the stock config's default.
    with_head_dim: what a model becomes whose head_dim isn't hidden_size / num_attention_heads any more, where vLLM's
        class computes it so and reads no head_dim; None: it is read.
    fp8_cache: whether vLLM's class takes the scales of an FP8 cache; its transformers backend doesn't.
    """

    model_type: str
    architecture: str
    block_norms: tuple[str, ...]
    head_norms: tuple[str, ...] = ()
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    biases: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
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
    with_head_dim: Recast | None = None
    fp8_cache: bool = True

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

    @property
    def output_norms(self) -> dict[str, str]:
        """Of o and of down, the norm that what it puts out goes through before the residual stream; empty where none.

        Where there is one of the two names alone, it is what Llama calls the MLP's input norm.
        """
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
        there = set(norms) <= set(self.block_norms)
        return dict(zip((self.o, self.down), norms, strict=True)) if there else {}

    @property
    def input_norms(self) -> dict[str, str]:
        """Of each projection that reads from the residual stream, the norm before it; empty where none (EXAONE 4)."""
        mlp = "post_attention_layernorm" if not self.output_norms else "pre_feedforward_layernorm"
        found = dict.fromkeys((self.q, self.k, self.v), "input_layernorm") | dict.fromkeys((self.gate, self.up), mlp)
        return {part: norm for part, norm in found.items() if norm in self.block_norms}

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
        of_layer = {f"{part}.weight": shape for part, shape in of_layer.items()}
        for part, key in self.biases.items():
            if key is None or getattr(config, key):
                of_layer[f"{part}.bias"] = of_layer[f"{part}.weight"][:1]
        layers = range(config.num_hidden_layers)
        found = {self.in_layer(layer, name): shape for layer in layers for name, shape in of_layer.items()}
        found |= {f"{self.embedding}.weight": (V, E), f"{self.final_norm}.weight": (E,)}
        if not config.tie_word_embeddings:
            found[f"{self.lm_head}.weight"] = (V, E)
        return found


def names() -> list[str]:
    """The families there are: the files of `families/`."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def head_dim(config: Mapping[str, Any]) -> int:
    """Of a config.json, which need not say it."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def take_rows(tensors: dict[str, LazyTensor], module: str, index: torch.Tensor) -> None:
    """Keep these outputs of a module: rows of its weight, and entries of its bias if it has one."""
    for name in (f"{module}.weight", f"{module}.bias"):
        if name in tensors:
            tensors[name] = tensors[name].take(0, index)


def take_columns(tensors: dict[str, LazyTensor], module: str, index: torch.Tensor) -> None:
    """Keep these inputs of a module: columns of its weight."""
    tensors[f"{module}.weight"] = tensors[f"{module}.weight"].take(1, index)


def recast(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint as an architecture that vLLM serves: itself, but for `Family.with_head_dim`."""
    other, config = family.with_head_dim, checkpoint.config
    if other is None or head_dim(config) * int(config["num_attention_heads"]) == int(config["hidden_size"]):
        return checkpoint
    made = {key: value for key, value in config.items() if key not in other.dropped} | {
        "model_type": other.model_type,
        "architectures": [other.architecture],
        **other.config,
    }
    own, its = stock_config(config).to_dict(), stock_config(made).to_dict()
    for key in (own.keys() & its.keys()) - {"model_type", "architectures", "head_dim", *other.config}:
        if own[key] != its[key]:  # a default of the one that the other doesn't share
            made[key] = own[key]
    tensors = dict(checkpoint.tensors)
    for layer in range(int(config["num_hidden_layers"])):
        for part in other.zero_biases:
            module = family.in_layer(layer, part)
            weight = tensors[f"{module}.weight"]
            tensors[f"{module}.bias"] = _zeros(weight.shape[:1], weight.dtype)
    return dataclasses.replace(checkpoint, config=made, tensors=tensors)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint.

    Raises CheckpointError for one that is unknown, or whose config or weights aren't quite what its name says.
    """
    config = checkpoint.config
    model_type = str(config.get("model_type"))
    if model_type not in names():
        reason = foreign(config) or f"known are {', '.join(names())} (a family is one file in compressors/families)"
        raise CheckpointError(f"architecture: model_type {model_type!r} is not known here; {reason}")
    family: Family = importlib.import_module(f"compressors.model.families.{model_type}").FAMILY
    stock = stock_config(config)
    for architecture in config.get("architectures") or [family.architecture]:
        if architecture != family.architecture:
            raise CheckpointError(
                f"architecture: config.json says {architecture}, and {model_type} is understood as "
                f"{family.architecture} alone; vLLM would load another model than transformers"
            )
    values = {**config, **stock.to_dict()}
    for key, allowed in {**REQUIRED, **family.required}.items():
        if key not in values:
            continue
        if any(value not in allowed for value in (values[key] if isinstance(values[key], list) else [values[key]])):
            said = " or ".join(map(repr, allowed))
            by_default = "" if key in config else " (config.json doesn't say, and it is transformers' default)"
            raise CheckpointError(
                f"architecture: {key} is {values[key]!r}{by_default}, and {model_type} is understood with {said} "
                "alone; this model can't be compressed without loss of meaning"
            )
    _check_sizes(config, stock, family)
    _check_weights(checkpoint, model_type, family.shapes(stock))
    return family


def _check_sizes(config: Mapping[str, Any], stock: Any, family: Family) -> None:
    """Sizes that config.json leaves open are taken from others here, and from a number in some stock configs."""
    heads = int(config["num_attention_heads"])
    for key, here in (
        ("num_key_value_heads", config.get("num_key_value_heads") or heads),
        ("head_dim", head_dim(config)),
    ):
        stocks = getattr(stock, key, None)
        if stocks is not None and stocks != here:
            raise CheckpointError(
                f"architecture: config.json says no {key}, and transformers takes {stocks} for {family.model_type}, "
                f"not {here}; write the right number into config.json"
            )
    if family.with_head_dim is not None and head_dim(config) * heads != int(config["hidden_size"]):
        raise CheckpointError(
            f"architecture: head_dim is {head_dim(config)}, and vLLM takes hidden_size / num_attention_heads = "
            f"{int(config['hidden_size'])} / {heads} for {family.model_type}; write this model as "
            f"{family.with_head_dim.model_type}"
        )


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
