"""Describes a checkpoint's directory: its sizes from config.json and headers, and the digest of its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from pathlib import Path
from typing import Any

from evaluator.errors import EvaluationError
from readers import json_reader, safetensors_files, safetensors_header
from readers.errors import ReadError
from readers.quantization_groups import group_of
from readers.regular import open_regular

BESIDE = re.compile(r"weight_shape|(weight|input|output|q|k|v)_(scale|global_scale|zero_point|g_idx)")  # no parameters


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
        EvaluationError: The directory holds none, or not all of them.
    """
    try:
        return safetensors_files.find(path)
    except (OSError, ReadError) as error:
        raise EvaluationError(f"{path}: {error}") from None


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
    total = 0
    for name, tensor in safetensors_header.read(file).items():
        module, _, part = name.rpartition(".")
        if BESIDE.fullmatch(part) or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        size = math.prod(tensor["shape"])
        total += size * (32 // _bits(module, config)) if part == "weight_packed" else size
    return total


def _bits(module: str, config: dict[str, Any]) -> int:
    """Return the bits of a packed module's weights, by the group that it belongs to, else by the first group."""
    quantization = config.get("quantization_config") or {}
    first: dict[str, Any] = next(iter((quantization.get("config_groups") or {}).values()), {})
    weights = (group_of(module, quantization) or first).get("weights") or {}
    return int(weights.get("num_bits") or 32)
