"""Checkpoint: config + lazily mapped tensors + tokenizer files. Read, write, put into a stock transformers model.

Knows no family and no method. Tensors are read when they are asked for, so that a compressed checkpoint costs no
memory until it is written or put into a model, and then one tensor at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compressors.errors import CheckpointError
from compressors.model import exaone3, safetensors_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # Llama 2 stored them
SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
CARRIED = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "LICENSE*",
)


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is known by its shape and dtype until `load` makes it: on the CPU, but for simulated weights."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def take(self, dim: int, index: torch.Tensor) -> LazyTensor:
        """Those rows (dim 0) or columns (dim 1) whose numbers are in `index` [kept], in that order."""
        shape = (*self.shape[:dim], len(index), *self.shape[dim + 1 :])
        return LazyTensor(shape, self.dtype, lambda: self.load().index_select(dim, index))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None) -> LazyTensor:
        """The same shape, computed from the tensor."""
        return LazyTensor(self.shape, dtype or self.dtype, lambda: function(self.load()))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """
    config: config.json. tensors: by their names in the weights. files: what is carried along, by file name.
    parameters: of the model before quantization packed it; None: count the tensors.
    activations: the scheme whose activation quantization an in-memory model is to imitate, by module name.
    """

    config: dict[str, Any]
    tensors: Mapping[str, LazyTensor]
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    parameters: int | None = None
    activations: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Checkpoint:
        """A directory as the hub has them; nothing but headers is read. Raises CheckpointError, one line.

        A config that names no dtype gets that of the weights, as stock transformers loads them, one that leaves
        tie_word_embeddings to a default of true gets that, and a tied head that is stored beside the embedding is left
        out. EXAONE 3.0 and 3.5 are read as the Llama that they are.
        """
        path = Path(path)
        config = read_json(path / "config.json", "a model's directory holds config.json")
        quantized = config.get("quantization_config")
        if quantized:
            how = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise CheckpointError(f"model {path}: is quantised already ({how}); start from the unquantised model")
        renamed = exaone3.is_exaone3(config)
        if renamed:
            config = exaone3.llama_config(config)
        for key in SIZES:
            if not isinstance(config.get(key), int) or config[key] < 1:
                rule = foreign(config) or "it must be a number"
                raise CheckpointError(f"model {path}: config.json says {key}: {config.get(key)!r}; {rule}")
        tensors: dict[str, LazyTensor] = {}
        for file in weight_files(path):
            for name, (shape, dtype) in safetensors_file.shapes(file).items():
                if not name.endswith(COMPUTED):
                    tensors[name] = LazyTensor(shape, dtype, safetensors_file.loader(file, name))
        if renamed:
            tensors = exaone3.llama_tensors(tensors)
            config.setdefault("tie_word_embeddings", HEAD not in tensors)  # versions differ in its default
        if config["num_hidden_layers"] > len(tensors):  # or a mere number would fill the memory with names
            raise CheckpointError(
                f"model {path}: config.json says num_hidden_layers: {config['num_hidden_layers']}, and the weights "
                f"hold {len(tensors)} tensors in all; they belong to different models"
            )
        if "tie_word_embeddings" not in config and _tied_by_default(config):
            config["tie_word_embeddings"] = True
        if config.get("tie_word_embeddings", False) and HEAD in tensors:
            tensors = _without_head(path, tensors)
        if not (config.get("dtype") or config.get("torch_dtype")):
            config["dtype"] = _stored_dtype(tensors)
        if not any((path / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(
                f"model {path}: has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy its files there"
            )
        files = {file.name: file for pattern in CARRIED for file in sorted(path.glob(pattern)) if file.is_file()}
        return cls(config, tensors, files)

    @property
    def total_parameters(self) -> int:
        if self.parameters is not None:
            return self.parameters
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        """Of the tensors, without the file's header."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Of model.safetensors."""
        return 8 + len(safetensors_file.header_of(self.tensors)) + self.size_bytes

    @property
    def decode_bytes(self) -> int:
        """Of the weights that one decode step reads: all of them, but of an untied embedding only a row."""
        tied = self.config.get("tie_word_embeddings", False)
        embedding = sum(tensor.nbytes for name, tensor in self.tensors.items() if name.endswith(EMBEDDING))
        return self.size_bytes - (0 if tied else embedding)

    def digest(self) -> str:
        """sha256 over config and tensors: 32 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].load().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def write(self, path: str | Path) -> str:
        """Write config.json, one model.safetensors and the carried files, beside `path` and then renamed into it.

        Returns the weights' sha256. What was at `path` is replaced. Raises CheckpointError when it can't be written.
        """
        path = Path(path)
        scratch = old = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            scratch.chmod(0o755)
            for name, source in self.files.items():
                shutil.copyfile(source, scratch / name)
            (scratch / "config.json").write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
            sha256 = safetensors_file.write(scratch / WEIGHTS, self.tensors)
            if path.exists():  # out of the way first: the place is never half of one and half of the other
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
                path.replace(old)
            try:
                scratch.replace(path)
            except OSError:
                if old is not None:
                    old.replace(path)
                raise
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: {error.strerror or error}; nothing was changed there") from None
        finally:
            for left in (scratch, old):
                if left is not None:
                    shutil.rmtree(left, ignore_errors=True)
        return sha256

    def to_model(self, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
        """The stock transformers model with these tensors, in eval mode.

        dtype: of the weights; None: the config's. Raises CheckpointError when tensors are missing or
        left over.
        """
        from transformers import AutoModelForCausalLM

        config = stock_config(self.config)
        wanted = dtype or _dtype(self.config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=False)
        state = {name: lazy.load().to(device, wanted) for name, lazy in self.tensors.items()}
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        missing = [name for name in missing if model.get_parameter(name).is_meta]
        if missing or unexpected:
            raise CheckpointError(
                f"weights: {len(missing)} tensors missing, {len(unexpected)} left over: {[*missing, *unexpected][:3]}"
            )
        _make_buffers(model, config, device)
        for name, scheme in self.activations.items():
            _imitate_activations(model.get_submodule(name), scheme)
        return model.to(device).eval().requires_grad_(False)


def stock_config(config: Mapping[str, Any]) -> Any:
    """The stock transformers config. Raises CheckpointError with its reason, such as Llama's that hidden_size must be a
    multiple of num_attention_heads.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**copy.deepcopy(dict(config)))  # it writes into a nested rope_scaling
    except Exception as error:  # the config classes raise their own mixture
        cause = error.__cause__ or error
        raise CheckpointError(f"transformers refuses the config: {' '.join(str(cause).split())}") from None


def foreign(config: Mapping[str, Any]) -> str | None:
    """Why a model isn't one of stock transformers' text models, where that is known; else None."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if isinstance(config.get("text_config"), dict):
        return f"a {model_type} model has its language model inside; save that alone, as its own model_type"
    if config.get("auto_map") and model_type not in CONFIG_MAPPING:
        return f"stock transformers has no {model_type}: it brings its own code, and a model's code is never run"
    return None


def digest_of(path: Path, cache: Path) -> str:
    """`Checkpoint.digest` of a directory, remembered by its files' sizes and times so that it is hashed once.

    Raises CheckpointError.
    """
    known = cache / stamp_of(path)
    if known.is_file():
        return known.read_text().strip()
    digest = Checkpoint.read(path).digest()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as out:
        out.write(digest)
    Path(out.name).replace(known)
    return digest


def stamp_of(path: Path, *, carried: bool = False) -> str:
    """Another one when a directory's config.json or weights are others, by place, size and time: 32 hexadecimal digits.

    carried: or its tokenizer, or what else a checkpoint carries along.
    Raises CheckpointError.
    """
    path = Path(path).resolve()
    read_json(path / "config.json", "a model's directory holds config.json")
    files = {path / "config.json", *path.glob("*.safetensors")}
    if carried:
        files |= {file for pattern in CARRIED for file in path.glob(pattern)}
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return hashlib.sha256(json.dumps([str(path), stamps]).encode()).hexdigest()[:32]


def _make_buffers(model: Any, config: Any, device: str) -> None:
    """Rotary frequencies and scales are no weights: they are computed, and a model made on `meta` has none yet."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "scalar_embed_scale"):  # Gemma's embedding
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], type(module)(config).to(device))


def _imitate_activations(linear: torch.nn.Module, scheme: str) -> None:
    """Round a Linear's input as the scheme's dynamic per-token quantization does, x [..., tokens, K]."""

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0]
        largest = x.abs().amax(dim=-1, keepdim=True).float()
        if scheme == "W8A8":
            scale = (largest / 127.5).clamp_min(torch.finfo(torch.float32).tiny)
            rounded = (x / scale).round().clamp(-128, 127) * scale
        else:  # FP8_DYNAMIC
            scale = (largest / 448.0).clamp_min(torch.finfo(torch.float32).tiny)
            rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return (rounded.to(x.dtype), *args[1:])

    linear.register_forward_pre_hook(hook)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return getattr(torch, name)  # type: ignore[no-any-return]


def _without_head(path: Path, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Stock transformers doesn't tie a head that differs from the embedding, and vLLM ties it all the same."""
    embedding = next((tensor for name, tensor in tensors.items() if name.endswith(EMBEDDING)), None)
    if embedding is None or not torch.equal(tensors[HEAD].load(), embedding.load()):
        raise CheckpointError(
            f"model {path}: config.json says tie_word_embeddings, and {HEAD} is not the embedding; say false there, or "
            "remove the tensor"
        )
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def _tied_by_default(config: Mapping[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    return model_type in CONFIG_MAPPING and bool(getattr(CONFIG_MAPPING[model_type], "tie_word_embeddings", False))


def _stored_dtype(tensors: Mapping[str, LazyTensor]) -> str:
    return str(max(tensors.values(), key=lambda tensor: tensor.nbytes).dtype).removeprefix("torch.")


def read_json(path: Path, rule: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"model {path.parent}: has no {path.name}; {rule}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"model {path.parent}: {path.name} can't be read ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"model {path.parent}: {path.name} is no JSON object")
    return values


def weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        named = read_json(path / INDEX, "").get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise CheckpointError(f"model {path}: {INDEX} has no weight_map of names to files; copy it again")
        files = sorted({path / Path(name).name for name in named.values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing or not files:
            raise CheckpointError(
                f"model {path}: shards named in {INDEX} are missing: {', '.join(missing) or 'all'}; copy them there"
            )
        return files
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"model {path}: has only pickled weights ({pickles[0]}), which can run code when they are read; convert "
            "them to safetensors"
        )
    raise CheckpointError(f"model {path}: has no weights; put {WEIGHTS} there, or its shards with {INDEX}")
