"""Read checkpoints, write them, and load them into stock transformers models.

A `Checkpoint` is a config, lazily loaded tensors and tokenizer files; this module knows no family and no method.
Tensors are read when they are asked for: a compressed checkpoint needs no memory until it is written or loaded into
a model. Then it needs that of one tensor at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from compressors import cached
from compressors.errors import CheckpointError, MachineError
from compressors.files import digest_of_json, scratch_directory
from compressors.model import config_types, config_values, exaone3, model_directory, safetensors_file, weight_names
from compressors.model.config_values import SIZES
from compressors.model.model_directory import CARRIED, WEIGHTS, require_json, weight_files
from compressors.model.shards import stored_weights
from compressors.model.stock_model import imitate_activations, make_buffers, with_values
from readers import regular
from readers.errors import ReadError

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # stored by Llama 2, and ignored
COPIERS = 4  # threads that copy weights to a GPU: the driver copies through buffers of its own, a thread at a time
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """LazyTensor is a tensor of known shape and dtype, whose values `load` computes on the CPU.

    `load` of simulated quantized weights may use another device.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def take(self, dim: int, index: torch.Tensor) -> LazyTensor:
        """Return the rows (dim 0) or columns (dim 1) whose numbers are in `index` [kept], in that order."""
        shape = (*self.shape[:dim], len(index), *self.shape[dim + 1 :])
        return LazyTensor(shape, self.dtype, lambda: self.load().index_select(dim, index))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None) -> LazyTensor:
        """Return a tensor of the same shape whose values are `function` of this one's; dtype None keeps the dtype."""
        return LazyTensor(self.shape, dtype or self.dtype, lambda: function(self.load()))

    def loaded(self) -> LazyTensor:
        """Return the tensor with its values loaded now, and kept."""
        values = self.load()
        return LazyTensor(self.shape, self.dtype, lambda: values)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Checkpoint holds a model's config, its lazily loaded tensors and the files that are copied along.

    Attributes:
        config: The values of config.json.
        tensors: The tensors by name.
        files: The files to copy along, such as the tokenizer's, by file name.
        parameters: The number of parameters before quantization packed them; None: count the tensors.
        activations: The scheme whose activation quantization a model in memory imitates, by module name.
        values: Integers, int8 [N, K], that a model in memory multiplies by scales [N, K/g], by module name: the tensors
            hold `weight_scale` there and no `weight`.
    """

    config: dict[str, Any]
    tensors: Mapping[str, LazyTensor]
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    parameters: int | None = None
    activations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    values: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Checkpoint:
        """Read a model's directory in the layout of the Hugging Face hub; of the weights only headers are read.

        A config without a dtype gets that of the weights, as stock transformers loads them. One without
        tie_word_embeddings gets true if that is the default of its class. A tied head that is stored as well as the
        embedding is left out. Names that lack "model.", as the base class saves them, get it where the head is
        tied or stored. EXAONE 3.0 and 3.5 are read as Llama.

        Raises:
            CheckpointError: When a file is missing or damaged, or the model is quantized; one line.
        """
        path = Path(path)
        inside = model_directory.files_of(path)
        config = require_json(path / "config.json", "a model's directory holds config.json")
        config_values.refuse_quantized(config, f"model {path}: ")
        config_types.require_config(path, config, config_types.LEFT_TO_VALUES)
        config_types.require_tokenizer_files(path, inside)
        renamed = exaone3.is_exaone3(config)
        if renamed:
            config = exaone3.llama_config(config)
        for key in SIZES:
            if not config_values.is_size(config.get(key)):
                rule = foreign(config) or config_values.size_rule(key)
                raise CheckpointError(
                    f"model {path}: config.json has {key}: {config_values.as_json(config.get(key))}; {rule}"
                )
        config = config_values.settled(config, f"model {path}: ")
        tensors = {
            name: LazyTensor(shape, dtype, safetensors_file.loader(file, name))
            for name, (file, shape, dtype) in stored_weights(weight_files(path)).items()
            if not name.endswith(COMPUTED)
        }
        if renamed:
            tensors = exaone3.llama_tensors(tensors)
            config.setdefault("tie_word_embeddings", HEAD not in tensors)  # versions differ in its default
        if config["num_hidden_layers"] > len(tensors):  # else the names of missing weights could fill the memory
            raise CheckpointError(
                f"model {path}: config.json has num_hidden_layers: {config['num_hidden_layers']}, but the weights "
                f"hold {len(tensors)} tensors in all; use config.json and weights of the same model"
            )
        if "tie_word_embeddings" not in config and _tied_by_default(config):
            config["tie_word_embeddings"] = True
        if not renamed and (config.get("tie_word_embeddings") or HEAD in tensors):
            config, tensors = weight_names.of_class_with_head(config, tensors)
        if config.get("tie_word_embeddings", False) and HEAD in tensors:
            tensors = _without_head(path, tensors)
        if not (config.get("dtype") or config.get("torch_dtype")):
            config["dtype"] = _stored_dtype(tensors)
        if not any((path / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(
                f"model {path}: has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy its files there"
            )
        return cls(config, tensors, model_directory.carried(path, inside))

    @property
    def total_parameters(self) -> int:
        """Return the number of parameters, that of the unquantized model for packed weights."""
        if self.parameters is not None:
            return self.parameters
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its weights by name; integers and their scales are the weight that they stand for."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        for module, values in self.values.items():
            del shapes[f"{module}.weight_scale"]
            shapes[f"{module}.weight"] = tuple(values.shape)
        return shapes

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all tensors, without the file's header."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Return the size of model.safetensors in bytes, header included."""
        return 8 + len(safetensors_file.header_of(self.tensors)) + self.size_bytes

    @property
    def decode_bytes(self) -> int:
        """Return the bytes that one decode step reads: all weights, and a single row of an untied embedding."""
        tied = self.config.get("tie_word_embeddings", False)
        embedding = sum(tensor.nbytes for name, tensor in self.tensors.items() if name.endswith(EMBEDDING))
        return self.size_bytes - (0 if tied else embedding)

    def digest(self) -> str:
        """Return 32 hexadecimal digits of a sha256 over the config and all tensors; the first call loads them all."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        loaders = {name: tensor.load for name, tensor in self.tensors.items()}
        loaders |= {f"{module}.values": values.cpu for module, values in self.values.items()}
        for name in sorted(loaders):
            tensor = loaders[name]().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def write(self, path: str | Path) -> str:
        """Write config.json, one model.safetensors and the files along, whole or not at all; replace what is at `path`.

        Returns:
            The sha256 of model.safetensors.

        Raises:
            MachineError: When the directory can't be written; then nothing is changed at `path`.
        """
        assert not self.values, "integers beside the tensors are for a model in memory"
        path = Path(path)
        scratch = old = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = scratch_directory(path)
            for name, source in self.files.items():
                regular.copy(source, scratch / name)
            (scratch / "config.json").write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
            sha256 = safetensors_file.write(scratch / WEIGHTS, self.tensors)
            if path.exists():  # moved away first, so that old and new files never mix
                old = scratch_directory(path)
                path.replace(old)
            try:
                scratch.replace(path)
            except OSError:
                if old is not None:
                    old.replace(path)
                raise
        except ReadError as error:
            raise CheckpointError(f"checkpoint {path}: {error}; nothing was changed there") from None
        except OSError as error:
            raise MachineError(f"checkpoint {path}: {error.strerror or error}; nothing was changed there") from None
        finally:
            for leftover in (scratch, old):
                if leftover is not None:
                    shutil.rmtree(leftover, ignore_errors=True)
        return sha256

    def to_model(self, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
        """Return the stock transformers model with these tensors, in eval mode and without gradients.

        Args:
            device: The device of the model.
            dtype: The dtype of its weights; None: that of the config.

        Raises:
            CheckpointError: When tensors are missing or left over.
        """
        from transformers import AutoModelForCausalLM

        config = stock_config(self.config)
        wanted = dtype or _dtype(self.config)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=False)
        except Exception as error:  # model classes raise errors of many types
            raise CheckpointError(config_values.refusal(self.config, error)) from None
        groups = {name: self.tensors[f"{name}.weight_scale"].shape[1] for name in self.values}
        with_values(model, {name: its.to(device) for name, its in self.values.items()}, groups)
        state = _on_device(self.tensors, device, wanted)
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        missing = [name for name in missing if model.get_parameter(name).is_meta]
        if missing or unexpected:
            raise CheckpointError(
                f"weights: {len(missing)} tensors missing, {len(unexpected)} left over: {[*missing, *unexpected][:3]}; "
                "use config.json and weights of the same model"
            )
        make_buffers(model, config, device)
        for name, scheme in self.activations.items():
            imitate_activations(model.get_submodule(name), scheme)
        return model.to(device).eval().requires_grad_(False)


def _on_device(tensors: Mapping[str, LazyTensor], device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return all values on the device; on a GPU, some are copied there while the next ones are read or computed."""
    if not device.startswith("cuda"):
        return {name: lazy.load().to(device, dtype) for name, lazy in tensors.items()}
    with ThreadPoolExecutor(COPIERS) as copiers:
        copied = {name: copiers.submit(lazy.load().to, device, dtype) for name, lazy in tensors.items()}
        return {name: tensor.result() for name, tensor in copied.items()}


def stock_config(config: Mapping[str, Any]) -> Any:
    """Return the stock transformers config of a config.json.

    Raises:
        CheckpointError: When transformers refuses it, such as a Llama's hidden_size that is no multiple of
            num_attention_heads; the message holds its reason.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**copy.deepcopy(dict(config)))  # transformers changes a nested rope_scaling
    except Exception as error:  # the config classes raise errors of many types
        raise CheckpointError(config_values.refusal(config, error)) from None


def foreign(config: Mapping[str, Any]) -> str | None:
    """Return why a model is not a text model of stock transformers, or None when no reason is known."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if isinstance(config.get("text_config"), dict):
        return f"a {model_type} model has its language model inside; save that part under its own model_type"
    if config.get("auto_map") and model_type not in CONFIG_MAPPING:
        return f"stock transformers has no {model_type}; it needs its own code, and a model's code is never run"
    return None


def digest_of(path: Path, cache: Path) -> str:
    """Return `Checkpoint.digest` of a directory, kept in `cache` under `stamp_of(path)` so that it is computed once.

    Raises:
        CheckpointError: When the directory can't be read.
    """
    stamp = stamp_of(path)

    def make(known: Path) -> None:
        earlier = cached.known(cache / stamp, _read_earlier_digest, held=True)
        cached.keep_json(known, {"digest": earlier or Checkpoint.read(path).digest()})

    return cached.kept(cache / f"{stamp}.json", lambda known: _digest(cached.read_json(known)["digest"]), make)


def _read_earlier_digest(known: Path) -> str:
    """Return the digest in a file of earlier versions, which holds nothing else."""
    cached.require_regular(known)
    return _digest(known.read_text()[:64].strip())


def _digest(value: Any) -> str:
    if re.fullmatch("[0-9a-f]{32}", str(value)) is None:
        raise ValueError(f"it holds {value!r}, and no digest")
    return str(value)


def stamp_of(path: Path, *, carried: bool = False) -> str:
    """Return 32 hexadecimal digits that change with the path, size or time of a directory's config.json or weights.

    Args:
        path: A model's directory.
        carried: Whether the tokenizer and the other files along count too.

    Raises:
        CheckpointError: When there is no readable config.json.
    """
    path = Path(path).resolve()
    require_json(path / "config.json", "a model's directory holds config.json")
    patterns = ("config.json", "*.safetensors", *(CARRIED if carried else ()))
    files = sorted(model_directory.matching(model_directory.files_of(path), *patterns).items())
    stamps = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, file in files]
    return digest_of_json([str(path), stamps], 32)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return getattr(torch, name)  # type: ignore[no-any-return]


def _without_head(path: Path, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Drop a tied head that is stored as well.

    If it differs from the embedding, stock transformers does not tie it and vLLM does, so that is an error.
    """
    embedding = next((tensor for name, tensor in tensors.items() if name.endswith(EMBEDDING)), None)
    if embedding is None or not torch.equal(tensors[HEAD].load(), embedding.load()):
        raise CheckpointError(
            f"model {path}: config.json sets tie_word_embeddings, but {HEAD} is not the embedding; set it to false, "
            "or remove the tensor"
        )
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def _tied_by_default(config: Mapping[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    return model_type in CONFIG_MAPPING and bool(getattr(CONFIG_MAPPING[model_type], "tie_word_embeddings", False))


def _stored_dtype(tensors: Mapping[str, LazyTensor]) -> str:
    return str(max(tensors.values(), key=lambda tensor: tensor.nbytes).dtype).removeprefix("torch.")
