"""What a model is made of, part by part and layer by layer; what could be cut, and what each cut would save.

Reads headers and config.json; of weights only the shapes that packed ones are stored with. Knows no printing.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compressors.errors import CheckpointError
from compressors.model import safetensors_file
from compressors.model.checkpoint import Checkpoint, LazyTensor, read_json, weight_files
from compressors.model.family import Family, family_of, names

KINDS = ("embedding", "attention", "mlp", "norms", "lm_head", "other")
# How modules are called where no family says it; norms first, since a norm may be named after what it precedes.
PATTERNS = {
    "norms": re.compile(r"norm[^.]*$|(^|\.)ln_[^.]*$"),
    "attention": re.compile(r"attn|attention"),
    "mlp": re.compile(r"mlp|ffn|feed_forward|experts|moe|(^|\.)(fc\d|(gate|up|down)_proj)$"),
}
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "tok_embeddings", "embed_positions", "embed_in")
HEADS = ("lm_head", "embed_out", "output")
NUMBERED = re.compile(r"^(.*?)\.(\d{1,6})\.(.+)$")  # prefix, layer, the rest
ORDER = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "c_fc"),
    *("down_proj", "input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm", "q_norm", "k_norm"),
)
PACKED = ("weight_packed", "qweight")
ASIDE = re.compile(  # what quantization stores beside the weights: bytes, and no parameters
    r"(weight|input|output|[qkv])_(global_)?(scale|scale_inv|zero_point)|(weight_)?g_idx|weight_shape|scales|qzeros|SCB"
    r"|weight\..+"  # bitsandbytes: weight.absmax, weight.quant_state.…
)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some weights together. name: of a module as in the checkpoint, in a layer without the layer's own name.

    shape, dtype: of one weight as it is multiplied ([out, in], unpacked) and as it is stored; None where they differ.
    count: how many such modules. parts: what it is made of, whose sums it has.
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
    index: int
    attention: Part
    mlp: Part
    norms: Part
    other: Part

    @property
    def total(self) -> Part:
        return _together(f"layer {self.index}", (self.attention, self.mlp, self.norms, self.other))

    def like(self, layer: LayerStructure) -> bool:
        """Whether both have the same weights in the same shapes and dtypes."""
        return dataclasses.replace(self, index=layer.index) == layer


@dataclasses.dataclass(frozen=True)
class Structure:
    """Of a whole model. The parts' sums are `parameters` and `bytes`; those of tied weights count once.

    bytes: of the tensors, without headers. decode_bytes: what one decode step reads of them; None where it is not known
    (experts of which only some work). Sizes are None where config.json says none.
    uncuttable: why no plan applies to this model, or None.
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
        return tuple(getattr(self, kind) for kind in KINDS)

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def heads_per_group(self) -> int | None:
        if self.num_attention_heads is None or self.num_key_value_heads is None:
            return None
        return self.num_attention_heads // self.num_key_value_heads


def describe(checkpoint: Checkpoint, family: Family) -> Structure:
    """The structure of a checkpoint of a known family; only headers are read."""
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
    """The structure of a model's directory, also of one that is quantised or of a family that is not known here: then
    its parts are told by the names of its tensors, and `uncuttable` says why it can't be cut.

    Raises CheckpointError for a directory without a readable config.json or without whole safetensors.
    """
    path = Path(path)
    config = read_json(path / "config.json", "a model's directory holds config.json")
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
        if last in EMBEDDINGS or last in HEADS:
            return "embedding" if last in EMBEDDINGS else "lm_head"
        return "norms" if PATTERNS["norms"].search(name) and not NUMBERED.match(name) else "other"

    made = _structure(tensors, config, place, kind)
    sparse = any("experts" in name.split(".") for name in tensors)
    return dataclasses.replace(made, decode_bytes=None if sparse else made.decode_bytes, uncuttable=uncuttable)


def _structure(
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    place: Callable[[str], tuple[int | None, str]],
    kind: Callable[[int | None, str], str],
) -> Structure:
    """place: module → (its layer or None, its name in there). kind: (layer, name) → one of KINDS."""
    found: dict[int | None, dict[str, list[Part]]] = {}
    for module in _modules(tensors, config.get("quantization_config")):
        layer, name = place(module.name)
        its_kind = kind(layer, name)
        found.setdefault(layer, {}).setdefault(its_kind, []).append(dataclasses.replace(module, name=_starred(name)))
    layers = [
        LayerStructure(
            index, *(_group(kind, found[index].get(kind, [])) for kind in ("attention", "mlp", "norms", "other"))
        )
        for index in sorted(layer for layer in found if layer is not None)
    ]
    whole = {kind: [part for layer in found.values() for part in layer.get(kind, [])] for kind in KINDS}
    parts = {kind: _group(kind, whole[kind]) for kind in KINDS}
    tied = bool(config.get("tie_word_embeddings", False)) or not whole["lm_head"]
    total = sum(part.bytes for part in parts.values())
    heads = _size(config, "num_attention_heads", "n_head")
    width = _size(config, "hidden_size", "n_embd")
    quantization = config.get("quantization_config")
    return Structure(
        model_type=str(config.get("model_type")),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or _dtype(_largest(tensors))),
        quantization=_method(quantization) if quantization else None,
        embedding=parts["embedding"],
        attention=parts["attention"],
        mlp=parts["mlp"],
        norms=parts["norms"],
        lm_head=parts["lm_head"],
        other=parts["other"],
        layers=tuple(layers),
        tied=tied,
        # a step multiplies by the head, and of an embedding that is none reads a row
        decode_bytes=total - (parts["lm_head"] if tied else parts["embedding"]).bytes,
        num_attention_heads=heads,
        num_key_value_heads=_size(config, "num_key_value_heads") or heads,
        head_dim=_size(config, "head_dim") or (width // heads if width and heads else None),
        hidden_size=width,
        intermediate_size=_size(config, "intermediate_size", "n_inner"),
        vocab_size=_size(config, "vocab_size"),
    )


def _modules(tensors: Mapping[str, LazyTensor], quantization: Any) -> list[Part]:
    """Module by module: a weight with its bias, its scales and whatever else is stored under its name."""
    by_module: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        module, suffix = _module(name)
        by_module.setdefault(module, {})[suffix] = tensor
    return [_part(module, stored, quantization) for module, stored in by_module.items()]


def _module(name: str) -> tuple[str, str]:
    """`a.q_proj.weight_scale` → (`a.q_proj`, `weight_scale`); a bare parameter is its own module, without a suffix."""
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
        its_shape = _unpacked(module, suffix, stored, quantization)
        parameters += math.prod(its_shape)
        if suffix != "bias":
            shape, dtype = its_shape, _dtype(tensor)
    return Part(module, parameters, sum(tensor.nbytes for tensor in stored.values()), shape, dtype)


def _unpacked(module: str, suffix: str, stored: Mapping[str, LazyTensor], quantization: Any) -> tuple[int, ...]:
    """The shape [out, in] of a weight of which several values are stored in one integer; others' own."""
    shape = stored[suffix].shape
    method = _method(quantization)
    if method.startswith("bitsandbytes") and stored[suffix].dtype == torch.uint8:  # two in a byte, flat
        return (math.prod(shape) * 2,)
    if suffix not in PACKED or len(shape) != 2:
        return shape
    if "weight_shape" in stored:
        rows, columns = stored["weight_shape"].load().tolist()
        if rows != shape[0] or not 0 < columns <= shape[1] * 32:
            raise CheckpointError(
                f"weights: {module} is packed as {shape[0]} × {shape[1]} integers, and its weight_shape is {rows} × "
                f"{columns}; copy or download it again"
            )
        return rows, columns
    bits = _bits(quantization)
    if bits is None:
        raise CheckpointError(
            f"weights: {module} is packed, and quantization_config in config.json doesn't say in how many bits; copy "
            "config.json again"
        )
    if method.startswith("awq"):  # [in, out·bits/32]
        return shape[1] * 32 // bits, shape[0]
    if suffix == "qweight":  # GPTQ: [in·bits/32, out]
        return shape[1], shape[0] * 32 // bits
    return shape[0], shape[1] * 32 // bits


def _method(quantization: Any) -> str:
    """`compressed-tensors int-quantized`, `gptq`."""
    if not isinstance(quantization, dict):
        return str(quantization)
    return " ".join(str(quantization[key]) for key in ("quant_method", "format") if quantization.get(key))


def _bits(quantization: Any) -> int | None:
    if not isinstance(quantization, dict):
        return None
    groups = quantization.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    weights = groups[0].get("weights") if groups and isinstance(groups[0], dict) else None
    said = (weights if isinstance(weights, dict) else {}).get("num_bits", quantization.get("bits"))
    return said if isinstance(said, int) and 0 < said <= 32 else None


def _dtype(tensor: LazyTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _largest(tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    return max(tensors.values(), key=lambda tensor: tensor.nbytes)


def _size(config: Mapping[str, Any], *keys: str) -> int | None:
    """A positive number of config.json, or of the language model's part of it."""
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, dict) else {}):
        for key in keys:
            value = values.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _starred(name: str) -> str:
    """Experts and the like have numbers: `mlp.experts.3.up_proj` → `mlp.experts.*.up_proj`."""
    return ".".join("*" if piece.isdigit() else piece for piece in name.split("."))


def _group(name: str, modules: Iterable[Part]) -> Part:
    """The modules of one name together, in the order in which a model runs them."""
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
