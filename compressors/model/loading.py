"""Write a checkpoint and check it before it is used: its weights are finite, and stock transformers loads it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from compressors.errors import CheckpointError, NotFiniteWeights
from compressors.model import safetensors_file
from compressors.model.checkpoint import Checkpoint, LazyTensor, stock_config
from compressors.model.finite import flaw_of
from compressors.model.model_directory import require_json, weight_files
from compressors.model.packed import PACKED, unpacked_shape
from compressors.model.stock_model import make_buffers
from compressors.model.transformers_version import retarget

SCALES = re.compile(r"(weight|input|output|[qkv])_(scale|zero_point)|weight_g_idx|weight_shape")
QUOTED = 120  # characters of a message of transformers that are shown


def write_checked(made: Checkpoint, path: Path, base: Checkpoint, target: str | None) -> tuple[str, list[str]]:
    """Write a checkpoint to a directory for a version of transformers, and check that it is finite and loads.

    Args:
        made: The checkpoint to write.
        path: The directory, which the caller removes after an error.
        base: The model that it was made of, which is named where its weights are the reason.
        target: The version that is to read it; None: the running one.

    Returns:
        The sha256 of model.safetensors, and a short statement for each change for `target`.

    Raises:
        CheckpointError: When a weight is NaN or infinite, when stock transformers can't load the checkpoint, and as
            `Checkpoint.write` and `retarget`.
    """
    try:
        weights_sha256 = made.write(path)
    except NotFiniteWeights as error:
        raise NotFiniteWeights(_why(error, made, base), error.name) from None
    changes = retarget(path, target) if target is not None else []
    require_loads(path)
    return weights_sha256, changes


def require_finite(checkpoint: Checkpoint, whose: str) -> None:
    """Check the values of all weights, which are read one after the other.

    Raises:
        CheckpointError: Naming the first tensor that holds NaN or infinity.
    """
    for name, lazy in checkpoint.tensors.items():
        flaw = flaw_of(lazy.load())
        if flaw is not None:
            raise CheckpointError(f"weights: {whose} {name} {flaw}; copy or download it again")


@contextlib.contextmanager
def broken_named(**models: Checkpoint) -> Iterator[None]:
    """Name the tensor of a model that is not finite, where that may be the reason of an error in the block.

    Args:
        models: The models that the block reads, by what they are.

    Raises:
        CheckpointError: The error of the block, or one that names the first tensor that holds NaN or infinity.
    """
    try:
        yield
    except NotFiniteWeights:
        raise
    except CheckpointError:
        for what, model in models.items():
            require_finite(model, f"the {what}'s")
        raise


def _why(error: NotFiniteWeights, made: Checkpoint, base: Checkpoint) -> str:
    """Return whose fault a weight is that is not finite, and what to do."""
    name = error.name
    if name not in base.tensors:
        name = f"{name.rpartition('.')[0]}.weight"  # a scale is made of its weight
    if name not in base.tensors:
        return str(error)
    values = base.tensors[name].load()
    flaw = flaw_of(values)
    if flaw is not None:
        return f"weights: the base model's {name} {flaw}; copy or download it again"
    written = made.tensors[error.name].dtype
    beyond = int(values.to(written).isinf().sum())
    if beyond:
        return (
            f"weights: {name} has {beyond} of {values.numel()} values beyond {torch.finfo(written).max:g}, the largest "
            f"number of {str(written).removeprefix('torch.')}, up to {float(values.abs().max()):g}; choose bfloat16 or "
            "float32"
        )
    return f"{error}, and the base model's {name} is finite; choose another method or dtype"


def require_loads(path: Path) -> None:
    """Check that stock transformers makes a model of a directory's config.json, and that its weights are those stored.

    The model is made without memory for its weights; of the files only headers are read.

    Raises:
        CheckpointError: Naming what stock transformers refuses, or the first weight that is missing or differs.
    """
    config = require_json(path / "config.json", "a model's directory holds config.json")
    expected = _stock_shapes(config)
    stored = _stored_shapes(path, config.get("quantization_config"))
    for name in sorted(expected.keys() | stored.keys()):
        wanted, found = expected.get(name), stored.get(name)
        if wanted != found:
            raise CheckpointError(
                f"weights: stock transformers would not load what was built: {name} is {_shape(found)}, and "
                f"config.json asks for {_shape(wanted)}; nothing was written"
            )


def _stock_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of the stock model by name, a tied head left out."""
    from transformers import AutoModelForCausalLM

    stock = stock_config(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(stock, trust_remote_code=False)
        model.tie_weights()
        make_buffers(model, stock, "cpu")
    except Exception as error:  # model classes raise errors of many types
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"config.json makes no model in transformers {importlib.metadata.version('transformers')} "
            f"({text[:QUOTED]}); correct the base model's config.json, or copy it again"
        ) from None
    for name, buffer in model.named_buffers():
        if not torch.isfinite(buffer).all():
            raise CheckpointError(
                f"config.json makes a model with {name} that is NaN or infinite; correct the settings of its rotary "
                "embedding (rope_parameters or rope_scaling)"
            )
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _stored_shapes(path: Path, quantization: Any) -> dict[str, tuple[int, ...]]:
    """Return the unpacked shapes of the stored weights by name, without what quantization stores next to them."""
    stored = {
        name: LazyTensor(shape, dtype, safetensors_file.loader(file, name))
        for file in weight_files(path)
        for name, (shape, dtype) in safetensors_file.shapes(file).items()
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in stored.items():
        module, _, suffix = name.rpartition(".")
        if quantization and suffix in PACKED:
            its = {other.rpartition(".")[2]: stored[other] for other in _aside(module) if other in stored}
            shapes[f"{module}.weight"] = unpacked_shape(module, suffix, {**its, suffix: tensor}, quantization)
        elif not (quantization and SCALES.fullmatch(suffix)):
            shapes[name] = tensor.shape
    return shapes


def _aside(module: str) -> tuple[str, ...]:
    return (f"{module}.weight_scale", f"{module}.weight_shape")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " × ".join(map(str, shape))
