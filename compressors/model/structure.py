"""Describe what a model is made of, part by part and layer by layer.

Headers and config.json are read; of the weights only the stored shapes of packed ones. Knows no printing.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.errors import CheckpointError
from compressors.model import config_types, model_directory, safetensors_file
from compressors.model.checkpoint import Checkpoint, LazyTensor
from compressors.model.family import Family, family_of, names
from compressors.model.model_directory import require_json, weight_files
from compressors.model.packed import PACKED, method_of, unpacked_shape

KINDS = ("embedding", "attention", "mlp", "norms", "lm_head", "other")
# What modules of unknown families are called; norms come first, since a norm may be named after what it precedes.
PATTERNS = {
    "norms": re.compile(r"norm[^.]*$|(^|\.)ln_[^.]*$"),
    "attention": re.compile(r"attn|attention"),
    "mlp": re.compile(r"mlp|ffn|feed_forward|experts|moe|(^|\.)(fc\d|(gate|up|down)_proj)$"),
}
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "tok_embeddings", "embed_positions", "embed_in")
OUTPUT_HEADS = ("lm_head", "embed_out", "output")
NUMBERED = re.compile(r"^(.*?)\.(\d{1,6})\.(.+)$")  # prefix, layer, the rest
ORDER = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "c_fc"),
    *("down_proj", "input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm", "q_norm", "k_norm"),
)
ASIDE = re.compile(  # what quantization stores next to the weights: it has bytes and no parameters
    r"(weight|input|output|[qkv])_(global_)?(scale|scale_inv|zero_point)|(weight_)?g_idx|weight_shape|scales|qzeros|SCB"
    r"|weight\..+"  # bitsandbytes: weight.absmax, weight.quant_state.…
)


@dataclasses.dataclass(frozen=True)
class Part:
    """Part is some weights together, with their sums.

    Attributes:
        name: The module's name in the checkpoint; within a layer, without the layer's own name.
        parameters: The number of parameters.
        bytes: The bytes as stored, scales included.
        shape: The shape of one unpacked weight, [out, in]; None where the parts differ.
        dtype: The dtype that the weight is stored in; None where the parts differ.
        count: The number of modules of this name.
        parts: The parts that this one sums up.
    """

    name: str
    parameters: int
    bytes: int
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    count: int = 1
    parts: tuple[Part, ...] = ()


@dataclasses.dataclass(frozen=True)
class LayerStructure:
    """LayerStructure is one decoder layer by kind of part."""

    index: int
    attention: Part
    mlp: Part
    norms: Part
    other: Part

    @property
    def total(self) -> Part:
        """Return all parts of the layer together."""
        return _together(f"layer {self.index}", (self.attention, self.mlp, self.norms, self.other))

    def like(self, layer: LayerStructure) -> bool:
        """Return whether both layers have the same weights in the same shapes and dtypes."""
        return dataclasses.replace(self, index=layer.index) == layer


@dataclasses.dataclass(frozen=True)
class Structure:
    """Structure describes a whole model; its parts add up to `parameters` and `bytes`, and tied weights count once.

    Sizes are None where config.json does not give them.

    Attributes:
        model_type: The model_type of config.json.
        dtype: The dtype of config.json, or that of the largest tensor.
        quantization: The quantization method and format, or None.
        embedding: The input embedding.
        attention: The attention of all layers.
        mlp: The MLPs of all layers.
        norms: All norms.
        lm_head: The output head, empty where it is tied.
        other: Everything else.
        layers: The decoder layers.
        tied: Whether the head is the embedding.
        decode_bytes: The bytes that one decode step reads; None where only some experts work.
        num_attention_heads: The query heads of a layer.
        num_key_value_heads: The key/value heads of a layer.
        head_dim: The width of a head.
        hidden_size: The width of the residual stream.
        intermediate_size: The FFN width.
        vocab_size: The number of tokens in the vocabulary.
        uncuttable: The reason why no plan applies to this model, or None.
    """

    model_type: str
    dtype: str
    quantization: str | None
    embedding: Part
    attention: Part
    mlp: Part
    norms: Part
    lm_head: Part
    other: Part
    layers: tuple[LayerStructure, ...]
    tied: bool
    decode_bytes: int | None
    num_attention_heads: int | None
    num_key_value_heads: int | None
    head_dim: int | None
    hidden_size: int | None
    intermediate_size: int | None
    vocab_size: int | None
    uncuttable: str | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return the parts of the model in the order of KINDS."""
        return tuple(getattr(self, kind) for kind in KINDS)

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        """Return the bytes of all tensors, without headers."""
        return sum(part.bytes for part in self.parts)

    @property
    def heads_per_group(self) -> int | None:
        """Return the number of query heads that share a key/value head, or None where it is unknown."""
        if self.num_attention_heads is None or self.num_key_value_heads is None:
            return None
        return self.num_attention_heads // self.num_key_value_heads


def describe(checkpoint: Checkpoint, family: Family) -> Structure:
    """Return the structure of a checkpoint of a known family; only headers are read."""
    config = checkpoint.config
    kinds = dict.fromkeys((family.q, family.k, family.v, family.o), "attention")
    kinds |= dict.fromkeys((family.gate, family.up, family.down), "mlp")
    kinds |= dict.fromkeys((*family.block_norms, *family.head_norms, family.final_norm), "norms")
    kinds |= {family.embedding: "embedding", family.lm_head: "lm_head"}

    def place(module: str) -> tuple[int | None, str]:
        numbered = NUMBERED.match(module.removeprefix(family.layers)) if module.startswith(family.layers) else None
        return (int(numbered[2]), numbered[3]) if numbered else (None, module)

    return _structure(checkpoint.tensors, config, place, lambda layer, name: kinds.get(name, "other"))


def describe_any(path: Path) -> Structure:
    """Return the structure of any model's directory, also of a quantized model or an unknown family.

    Their parts are told apart by the names of their tensors, and `uncuttable` holds the reason why they can't be cut.

    Raises:
        CheckpointError: For a directory without a readable config.json or without whole safetensors.
    """
    path = Path(path)
    model_directory.files_of(path)
    config = require_json(path / "config.json", "a model's directory holds config.json")
    config_types.require_config(path, config)
    tensors: dict[str, LazyTensor] = {}
    for file in weight_files(path):
        for name, (shape, dtype) in safetensors_file.shapes(file).items():
            tensors[name] = LazyTensor(shape, dtype, safetensors_file.loader(file, name))
    if not tensors:
        raise CheckpointError(f"model {path}: its weights hold no tensors; copy or download them again")
    try:
        base = Checkpoint.read(path) if config.get("model_type") in names() else Checkpoint(config, tensors)
        return describe(base, family_of(base))
    except CheckpointError as error:
        return _by_names(tensors, config, str(error))


def _by_names(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], uncuttable: str) -> Structure:
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        numbered = NUMBERED.match(name)
        if numbered:
            sizes[numbered[1]] += tensor.nbytes
    layers = max(sizes, key=lambda prefix: sizes[prefix], default=None)  # a vision tower's layers are the smaller ones

    def place(module: str) -> tuple[int | None, str]:
        numbered = NUMBERED.match(module)
        return (int(numbered[2]), numbered[3]) if numbered and numbered[1] == layers else (None, module)

    def kind(layer: int | None, name: str) -> str:
        last = name.rpartition(".")[2]
        if layer is not None:
            return next((kind for kind, pattern in PATTERNS.items() if pattern.search(name)), "other")
        if last in EMBEDDINGS or last in OUTPUT_HEADS:
            return "embedding" if last in EMBEDDINGS else "lm_head"
        return "norms" if PATTERNS["norms"].search(name) and not NUMBERED.match(name) else "other"

    structure = _structure(tensors, config, place, kind)
    sparse = any("experts" in name.split(".") for name in tensors)
    return dataclasses.replace(
        structure, decode_bytes=None if sparse else structure.decode_bytes, uncuttable=uncuttable
    )


def _structure(
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    place: Callable[[str], tuple[int | None, str]],
    kind: Callable[[int | None, str], str],
) -> Structure:
    """Sum up the tensors by layer and kind.

    Args:
        tensors: The tensors by name.
        config: The values of config.json.
        place: A function from a module's name to (its layer or None, its name within the layer).
        kind: A function from (layer, name) to one of KINDS.
    """
    by_layer: dict[int | None, dict[str, list[Part]]] = {}
    for module in _modules(tensors, config.get("quantization_config")):
        layer, name = place(module.name)
        its_kind = kind(layer, name)
        by_layer.setdefault(layer, {}).setdefault(its_kind, []).append(dataclasses.replace(module, name=_starred(name)))
    layers = [
        LayerStructure(
            index, *(_group(kind, by_layer[index].get(kind, [])) for kind in ("attention", "mlp", "norms", "other"))
        )
        for index in sorted(layer for layer in by_layer if layer is not None)
    ]
    whole = {kind: [part for layer in by_layer.values() for part in layer.get(kind, [])] for kind in KINDS}
    parts = {kind: _group(kind, whole[kind]) for kind in KINDS}
    tied = bool(config.get("tie_word_embeddings", False)) or not whole["lm_head"]
    total = sum(part.bytes for part in parts.values())
    heads = _size(config, "num_attention_heads", "n_head")
    width = _size(config, "hidden_size", "n_embd")
    quantization = config.get("quantization_config")
    return Structure(
        model_type=str(config.get("model_type")),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or _dtype(_largest(tensors))),
        quantization=method_of(quantization) if quantization else None,
        embedding=parts["embedding"],
        attention=parts["attention"],
        mlp=parts["mlp"],
        norms=parts["norms"],
        lm_head=parts["lm_head"],
        other=parts["other"],
        layers=tuple(layers),
        tied=tied,
        # a step multiplies by the head, and reads one row of an embedding that is not the head
        decode_bytes=total - (parts["lm_head"] if tied else parts["embedding"]).bytes,
        num_attention_heads=heads,
        num_key_value_heads=_size(config, "num_key_value_heads") or heads,
        head_dim=_size(config, "head_dim") or (width // heads if width and heads else None),
        hidden_size=width,
        intermediate_size=_size(config, "intermediate_size", "n_inner"),
        vocab_size=_size(config, "vocab_size"),
    )


def _modules(tensors: Mapping[str, LazyTensor], quantization: Any) -> list[Part]:
    """Return a part per module: a weight with its bias, its scales and whatever else is stored under its name."""
    by_module: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        module, suffix = _module(name)
        by_module.setdefault(module, {})[suffix] = tensor
    return [_part(module, stored, quantization) for module, stored in by_module.items()]


def _module(name: str) -> tuple[str, str]:
    """Split `a.q_proj.weight_scale` into (`a.q_proj`, `weight_scale`); a bare parameter has no suffix."""
    module, dot, rest = name.partition(".weight.")
    if dot:
        return module, f"weight.{rest}"
    module, _, suffix = name.rpartition(".")
    if module and (suffix in ("weight", "bias", *PACKED) or ASIDE.fullmatch(suffix)):
        return module, suffix
    return name, ""


def _part(module: str, stored: Mapping[str, LazyTensor], quantization: Any) -> Part:
    parameters, shape, dtype = 0, None, None
    for suffix, tensor in stored.items():
        if ASIDE.fullmatch(suffix):
            continue
        its_shape = unpacked_shape(module, suffix, stored, quantization)
        parameters += math.prod(its_shape)
        if suffix != "bias":
            shape, dtype = its_shape, _dtype(tensor)
    return Part(module, parameters, sum(tensor.nbytes for tensor in stored.values()), shape, dtype)


def _dtype(tensor: LazyTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _largest(tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    return max(tensors.values(), key=lambda tensor: tensor.nbytes)


def _size(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first positive number among `keys` of config.json or of its language model's part."""
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, dict) else {}):
        for key in keys:
            value = values.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _starred(name: str) -> str:
    """Replace the numbers of experts and the like: `mlp.experts.3.up_proj` → `mlp.experts.*.up_proj`."""
    return ".".join("*" if piece.isdigit() else piece for piece in name.split("."))


def _group(name: str, modules: Iterable[Part]) -> Part:
    """Merge modules of one name, and order the names as a model runs them."""
    by_name: dict[str, list[Part]] = {}
    for module in modules:
        by_name.setdefault(module.name, []).append(module)

    def rank(name: str) -> tuple[int, str]:
        last = name.rpartition(".")[2]
        return ORDER.index(last) if last in ORDER else len(ORDER), name

    return _together(name, [_alike(by_name[name]) for name in sorted(by_name, key=rank)])


def _alike(modules: Sequence[Part]) -> Part:
    first = modules[0]
    return Part(
        first.name,
        sum(module.parameters for module in modules),
        sum(module.bytes for module in modules),
        first.shape if all(module.shape == first.shape for module in modules) else None,
        first.dtype if all(module.dtype == first.dtype for module in modules) else None,
        len(modules),
    )


def _together(name: str, parts: Sequence[Part]) -> Part:
    return Part(
        name,
        sum(part.parameters for part in parts),
        sum(part.bytes for part in parts),
        count=sum(part.count for part in parts),
        parts=tuple(parts),
    )
