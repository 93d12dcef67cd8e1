"""Describes a checkpoint's directory: its sizes from config.json and headers, and the digest of its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

from evaluator.errors import EvaluationError
from readers import json_reader, safetensors_header
from readers.regular import open_regular


@dataclasses.dataclass(frozen=True)
class Described:
    """The sizes of a checkpoint directory.

    Attributes:
        bytes: The bytes of its weight files.
        parameters: The parameters of the dequantized model; a tied embedding counts once.
        layers: num_hidden_layers.
        heads: num_attention_heads.
        hidden: hidden_size.
    """

    bytes: int
    parameters: int
    layers: int
    heads: int
    hidden: int


def describe(path: Path) -> Described:
    """Describe a checkpoint from config.json and the safetensors headers; no weight is read.

    Raises:
        EvaluationError: The directory is not a readable checkpoint.
    """
    try:
        config = json_reader.read(path / "config.json", finite=False)
        files = weight_files(path)
        return Described(
            bytes=sum(file.stat().st_size for file in files),
            parameters=sum(_parameters(file, config) for file in files),
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            hidden=int(config["hidden_size"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{path}: is not a readable checkpoint: {type(error).__name__}: {error}") from None


def weight_files(path: Path) -> list[Path]:
    """Return model.safetensors, or the files that it is split into, sorted by name.

    Raises:
        EvaluationError: The directory holds none.
    """
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise EvaluationError(f"{path}: holds no model.safetensors; name a checkpoint directory")
    return files


def weights_sha256_of(path: Path) -> str:
    """Return the sha256 of model.safetensors; if it is split, of its files' bytes in the order of their names."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        with open_regular(file) as source:
            while block := source.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _parameters(file: Path, config: dict[str, Any]) -> int:
    """Count the parameters of a safetensors file as if compressed-tensors had packed and scaled none."""
    header = safetensors_header.read(file)
    per_word = 32 // _bits(config)
    total = 0
    for name, tensor in header.items():
        part = name.rpartition(".")[2]
        if part in ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale"):
            continue
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        size = math.prod(tensor["shape"])
        total += size * per_word if part == "weight_packed" else size
    return total


def _bits(config: dict[str, Any]) -> int:
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    for group in groups.values():
        return int((group.get("weights") or {}).get("num_bits") or 32)
    return 32
