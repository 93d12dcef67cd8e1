"""Say where a model keeps its parts, and which config keys it understands; one family per file in `families/`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import torch

from compressors.errors import CheckpointError
from compressors.model import families, weight_names
from compressors.model.checkpoint import Checkpoint, LazyTensor, foreign, stock_config
from compressors.model.config_values import as_json, require_model_type, require_values

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REQUIRED = {  # of every family: no experts, and no logit_scale, which vLLM reads and transformers doesn't
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "logit_scale": (None, 1.0),
}


@dataclasses.dataclass(frozen=True)
class Recast:
    """Recast is another stock architecture that computes the same from the same weights under the same names.

    Attributes:
        model_type: Its model_type.
        architecture: The name of its class.
        config: The keys that its config.json has in addition.
        dropped: The keys that it doesn't know.
        zero_biases: The projections that have a bias in it and none in the original.
    """

    model_type: str
    architecture: str
    config: Mapping[str, Any]
    dropped: tuple[str, ...]
    zero_biases: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """Family names the modules of a stock transformers class; a weight's name is its module's name and `.weight`.

    Attributes:
        model_type: The model_type of config.json.
        architecture: The name of the class.
        block_norms: The norms of a layer over the residual width, with hidden_size gains.
        head_norms: The norms of a layer over head_dim.
        norm_offset: The number that a norm adds to its weight: its gain is weight + norm_offset.
        scaled_embedding: Whether embeddings are multiplied by √hidden_size.
        biases: The projections with a bias → the config key that turns it on; None: always.
        q: The query projection within a layer; likewise k, v, o, gate, up and down.
        layers: The list of layers; likewise embedding, final_norm and lm_head.
        required: The values that a config key must have, given or by the stock config's default; another value would
            mean another architecture. For a list, each entry counts. A key that the stock config doesn't know counts
            only where config.json has it.
        per_layer: The config keys with a list of one entry per layer, given or by the stock config's default.
        with_head_dim: The architecture to write when head_dim is not hidden_size / num_attention_heads, for a family
            whose vLLM class computes it so; None: vLLM reads head_dim.
        fp8_cache: Whether vLLM's class takes the scales of an FP8 cache; its transformers backend doesn't.
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
        """Return the name of a layer."""
        return f"{self.layers}.{index}"

    def in_layer(self, index: int, part: str) -> str:
        """Return the name of a module of a layer."""
        return f"{self.layers}.{index}.{part}"

    @property
    def linears(self) -> tuple[str, ...]:
        """Return the projections of a layer, which quantization takes."""
        return (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)

    @property
    def fused(self) -> tuple[tuple[str, ...], ...]:
        """Return the projections of a layer, grouped as vLLM runs them: one matrix per group."""
        return ((self.q, self.k, self.v), (self.o,), (self.gate, self.up), (self.down,))

    @property
    def output_norms(self) -> dict[str, str]:
        """Return, for o and down, the norm between their output and the residual stream; empty for families without.

        A family that has only one of the two names uses it as Llama does, for the MLP's input norm.
        """
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
        has_both = set(norms) <= set(self.block_norms)
        return dict(zip((self.o, self.down), norms, strict=True)) if has_both else {}

    @property
    def input_norms(self) -> dict[str, str]:
        """Return, by projection that reads the residual stream, the norm before it; empty for EXAONE 4, without one."""
        mlp = "post_attention_layernorm" if not self.output_norms else "pre_feedforward_layernorm"
        before = dict.fromkeys((self.q, self.k, self.v), "input_layernorm") | dict.fromkeys((self.gate, self.up), mlp)
        return {part: norm for part, norm in before.items() if norm in self.block_norms}

    def residual_norms(self, layers: int) -> list[str]:
        """Return the names of all norms over the residual width, the final one last."""
        return [self.in_layer(i, norm) for i in range(layers) for norm in self.block_norms] + [self.final_norm]

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all weights of a model of this family by name.

        Symbols: E hidden size, H query heads, G key/value heads, D head_dim, F FFN width, V vocabulary.

        Args:
            config: The model's stock transformers config.
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
        shapes = {self.in_layer(layer, name): shape for layer in layers for name, shape in of_layer.items()}
        shapes |= {f"{self.embedding}.weight": (V, E), f"{self.final_norm}.weight": (E,)}
        if not config.tie_word_embeddings:
            shapes[f"{self.lm_head}.weight"] = (V, E)
        return shapes


def names() -> list[str]:
    """Return the known families: the file names in `families/`."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def named(model_type: str) -> Family:
    """Return the family that a file of `families/` describes."""
    family: Family = importlib.import_module(f"compressors.model.families.{model_type}").FAMILY
    return family


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the head_dim of a config.json, which need not contain it."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def take_rows(tensors: dict[str, LazyTensor], module: str, index: torch.Tensor) -> None:
    """Keep the outputs `index` of a module in `tensors`: rows of its weight, and entries of its bias if it has one."""
    for name in (f"{module}.weight", f"{module}.bias"):
        if name in tensors:
            tensors[name] = tensors[name].take(0, index)


def take_columns(tensors: dict[str, LazyTensor], module: str, index: torch.Tensor) -> None:
    """Keep the inputs `index` of a module in `tensors`: columns of its weight."""
    tensors[f"{module}.weight"] = tensors[f"{module}.weight"].take(1, index)


def recast(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """Return the checkpoint as an architecture that vLLM serves: itself, or `Family.with_head_dim` if needed."""
    other, config = family.with_head_dim, checkpoint.config
    if other is None or head_dim(config) * int(config["num_attention_heads"]) == int(config["hidden_size"]):
        return checkpoint
    recasted = {key: value for key, value in config.items() if key not in other.dropped} | {
        "model_type": other.model_type,
        "architectures": [other.architecture],
        **other.config,
    }
    own, its = stock_config(config).to_dict(), stock_config(recasted).to_dict()
    for key in (own.keys() & its.keys()) - {"model_type", "architectures", "head_dim", *other.config}:
        if own[key] != its[key]:  # the two classes have different defaults
            recasted[key] = own[key]
    tensors = dict(checkpoint.tensors)
    for layer in range(int(config["num_hidden_layers"])):
        for part in other.zero_biases:
            module = family.in_layer(layer, part)
            weight = tensors[f"{module}.weight"]
            tensors[f"{module}.bias"] = _zeros(weight.shape[:1], weight.dtype)
    return dataclasses.replace(checkpoint, config=recasted, tensors=tensors)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def family_of(checkpoint: Checkpoint) -> Family:
    """Return the family of a checkpoint.

    Raises:
        CheckpointError: When it is unknown, or when its config or weights differ from what its name promises.
    """
    config = checkpoint.config
    require_model_type(config)
    model_type = str(config["model_type"])
    if model_type not in names():
        reason = (
            foreign(config) or f"known are {', '.join(names())} (a family is one file in compressors/model/families)"
        )

        raise CheckpointError(f"architecture: model_type {model_type!r} is not known here; {reason}")
    family = named(model_type)
    require_values(config)
    stock = stock_config(config)
    architectures = config.get("architectures") or [family.architecture]
    if not isinstance(architectures, list):
        raise CheckpointError(
            f'architecture: config.json has architectures: {as_json(architectures)}; write ["{family.architecture}"]'
        )
    for architecture in architectures:
        if architecture != family.architecture:
            raise CheckpointError(
                f"architecture: config.json names {architecture}, but {model_type} models are read only as "
                f"{family.architecture}; vLLM would load another model than transformers"
            )
    values = {**config, **stock.to_dict()}
    for key, allowed in {**REQUIRED, **family.required}.items():
        if key not in values:
            continue
        if any(value not in allowed for value in (values[key] if isinstance(values[key], list) else [values[key]])):
            rule = " or ".join(map(as_json, allowed))
            by_default = "" if key in config else " (transformers' default, since config.json lacks it)"
            raise CheckpointError(
                f"architecture: {key} is {as_json(values[key])}{by_default}, but {model_type} models must have "
                f"{rule}; this model can't be compressed"
            )
    _check_sizes(config, stock, family)
    _check_weights(checkpoint, model_type, family.shapes(stock))
    return family


def _check_sizes(config: Mapping[str, Any], stock: Any, family: Family) -> None:
    """Refuse a size that config.json leaves out and the stock config fills with another number than this package."""
    heads = int(config["num_attention_heads"])
    for key, here in (
        ("num_key_value_heads", config.get("num_key_value_heads") or heads),
        ("head_dim", head_dim(config)),
    ):
        stocks = getattr(stock, key, None)
        if stocks is not None and stocks != here:
            raise CheckpointError(
                f"architecture: config.json lacks {key}, and transformers takes {stocks} for {family.model_type}, "
                f"not {here}; write the right number into config.json"
            )
    if family.with_head_dim is not None and head_dim(config) * heads != int(config["hidden_size"]):
        raise CheckpointError(
            f"architecture: head_dim is {head_dim(config)}, but vLLM takes hidden_size / num_attention_heads = "
            f"{int(config['hidden_size'])} / {heads} for {family.model_type}; write this model as "
            f"{family.with_head_dim.model_type}"
        )


def _check_weights(checkpoint: Checkpoint, model_type: str, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse missing and unknown weights, since a plan is cut from shapes before any weight is read."""
    found = checkpoint.shapes
    missing, unknown = sorted(expected.keys() - found), sorted(found.keys() - expected)
    reason = None
    if missing or unknown:
        layers = int(checkpoint.config["num_hidden_layers"])
        reason = weight_names.why_unknown(expected.keys(), found.keys(), layers)
    if reason is not None:
        raise CheckpointError(f"weights: {reason}")
    if missing:
        raise CheckpointError(f"weights: {len(missing)} are missing, {missing[0]} first; copy or download them again")
    if unknown:
        raise CheckpointError(
            f"weights: {len(unknown)} are not known to {model_type}, {unknown[0]} first; they would be lost, so this "
            "model can't be compressed"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"weights: {name} is {' × '.join(map(str, found[name]))}, but by config.json it is "
                f"{' × '.join(map(str, shape))}; use config.json and weights of the same model, "
                f"or correct compressors/model/families/{model_type}.py, if it does not describe this architecture"
            )
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"weights: {name} is {str(tensor.dtype).removeprefix('torch.')}; start from the unquantized model"
            )
