"""A checkpoint directory → submit.zip, after the submission list: what a server's vLLM and transformers will accept.

Knows no study and no plan: it looks at any directory. Nothing in it is run, and nothing but safetensors, JSON and
tokenizer files is read.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from compressors.errors import CheckpointError
from compressors.model import family, safetensors_file, transformers_version
from compressors.model.checkpoint import (
    HEAD,
    INDEX,
    SIZES,
    TOKENIZER_FILES,
    WEIGHTS,
    Checkpoint,
    LazyTensor,
    stock_config,
)
from search.errors import UsageError
from search.files import read_json
from search.processes import process_alive
from search.setup.machine import require_memory
from search.setup.texts import tokenizer_of

ALLOWED = (  # beside the weights
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "README.md",
)
OWN = ("eval_result.json", "compression.json")  # optuna-search's notes on the model: they stay here
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack")
UNPACKED = ("int-quantized", "float-quantized", "naive-quantized")  # a weight of its own shape, and its scale
PACKED = "pack-quantized"  # several numbers in an int32
MOST_LAYERS = 10_000  # or a mere number would fill the memory, once transformers lists them
BLOCK = 8 << 20  # bytes read at a time
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold: the same for every file


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the list. found: what was found; where it isn't ok, also what to do."""

    name: str
    ok: bool
    found: str


@dataclasses.dataclass(frozen=True)
class Packed:
    path: Path
    bytes: int
    sha256: str
    files: tuple[str, ...]  # names in the zip


def check(
    model: Path, *, target: str | None = transformers_version.DEFAULT, max_model_mb: float | None = None
) -> list[Rule]:
    """Every rule of the list, in order, for the checkpoint in `model`.

    target: the version of transformers that is to read it; None: no version is asked for.
    max_model_mb: of the weights; 1 MB = 1e6 bytes. Raises UsageError when there is no such directory, CheckpointError
    for a target that is not known.
    """
    model = Path(model)
    if not model.is_dir():
        raise UsageError(f"package: {model}: no such directory; name a checkpoint's, such as submit/model")
    rules = [_rule("config.json", lambda: _config(model))]
    config = read_json(model / "config.json") or {}
    if target is not None:
        transformers_version.in_old_form(target)
    if rules[0].ok:
        rules.append(_rule("weights", lambda: _weights(model, config)))
        rules.append(_rule("tokenizer", lambda: _tokenizer(model, config)))
    rules.append(_rule("files", lambda: _files(model)))
    rules.append(_rule("size", lambda: _size(model, max_model_mb)))
    if target is not None and rules[0].ok:
        wanted = target
        rules.append(_rule("transformers_version", lambda: _version(config, wanted)))
        rules.append(_rule("form", lambda: _form(model, config, wanted)))
    if all(rule.ok for rule in rules if rule.name in ("config.json", "weights", "tokenizer")):
        rules.append(_rule("loads", lambda: _loads(model)))
    else:
        rules.append(Rule("loads", False, "not tried; first put right what is above"))
    return rules


def pack(
    model: Path,
    out: Path,
    *,
    target: str | None = transformers_version.DEFAULT,
    max_model_mb: float | None = None,
    max_zip_mb: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    checked: Sequence[Rule] | None = None,
) -> Packed:
    """Write the checkpoint in `model` to the zip file `out`, as `model/config.json`, `model/model.safetensors`, …

    The same files give the same bytes, whatever their times and owners and the name of their directory: fixed order,
    times and modes, nothing deflated (weights don't shrink, and zlibs differ). Written block by block beside its place
    and then renamed into it: after an error or Ctrl-C nothing is left, and what was there before is untouched.

    max_zip_mb: 1 MB = 1e6 bytes. progress: told the bytes written and their number. checked: what `check` said of
    `model` just now, to spare the time. Raises UsageError: one line, with every rule that fails.
    """
    model, out = Path(model), Path(out)
    rules = check(model, target=target, max_model_mb=max_model_mb) if checked is None else checked
    failed = [f"{rule.name}: {rule.found}" for rule in rules if not rule.ok]
    if failed:
        raise UsageError(f"package {model}: {len(failed)} of {len(rules)} rules fail: {' · '.join(failed)}")
    if out.is_dir():
        raise UsageError(f"package to {out}: is a directory; name a file, such as submit.zip")
    if model.resolve() in out.resolve().parents:
        raise UsageError(f"package to {out}: is inside the model's directory; name a file outside {model}")
    names = sorted(path.name for path in model.iterdir() if path.name not in OWN)
    total = sum((model / name).stat().st_size for name in names)
    _require_small(out, total, max_zip_mb)
    _require_disk(out, total)
    scratch, made = out.with_name(f".{out.name}.package-{os.getpid()}"), _missing_parents(out)
    whole = False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        _write(scratch, model, names, total, progress)
        size = scratch.stat().st_size
        _require_small(out, size, max_zip_mb)
        sha256 = _sha256(scratch)
        scratch.replace(out)
        whole = True
    except OSError as error:
        raise UsageError(f"package to {out}: {error.strerror or error}; nothing was changed there") from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
            for directory in () if whole else made:
                directory.rmdir()
    return Packed(out, size, sha256, tuple(f"model/{name}" for name in names))


def to_json(rules: Sequence[Rule], packed: Packed | None = None) -> dict[str, Any]:
    found = None if packed is None else {**dataclasses.asdict(packed), "path": str(packed.path)}
    return {"rules": [dataclasses.asdict(rule) for rule in rules], "packed": found}


# -- the rules: each returns what it found, or raises CheckpointError with what is wrong and what to do -----------


def _rule(name: str, look: Callable[[], str]) -> Rule:
    try:
        return Rule(name, True, look())
    except CheckpointError as error:
        return Rule(name, False, str(error).removeprefix(f"{name}: "))
    except OSError as error:
        return Rule(name, False, f"{error.filename}: {error.strerror or error}; make it readable")


def _config(model: Path) -> str:
    path = model / "config.json"
    if not path.is_file():
        raise CheckpointError("is missing; copy it there, or export the model again")
    values = read_json(path)
    if values is None:
        raise CheckpointError("is no JSON object; export the model again")
    for key in SIZES:
        if not isinstance(values.get(key), int):
            raise CheckpointError(f"says {key}: {values.get(key)!r}, which must be a number; export the model again")
    if values["num_hidden_layers"] > MOST_LAYERS:
        raise CheckpointError(
            f"says num_hidden_layers: {values['num_hidden_layers']}, and no model has so many; export the model again"
        )
    stock_config(values)
    return f"{values.get('model_type')}, {values.get('num_hidden_layers')} layers"


def _weights(model: Path, config: Mapping[str, Any]) -> str:
    """All tensors that the stock model of this config wants, with its shapes, and none left over."""
    tensors = _tensors(model)
    told = f"{len(tensors)} tensors in safetensors"
    if config.get("model_type") not in family.names():
        return f"{told}; {config.get('model_type')} is not known here, so only loading shows whether they are complete"
    if config.get("tie_word_embeddings") and HEAD in tensors:
        tensors = _without_tied_head(tensors)
    quantization = config.get("quantization_config")
    if not quantization:
        family.family_of(Checkpoint(copy.deepcopy(dict(config)), tensors))
        return f"{told}, complete"
    if not _understood(quantization):
        how = quantization.get("format") or quantization.get("quant_method")
        return f"{told}; {how} is not known here, so only loading shows whether they are complete"
    plain = copy.deepcopy({key: value for key, value in config.items() if key != "quantization_config"})
    unpacked, quantised = _unpacked(tensors, quantization)
    its_family = family.family_of(Checkpoint(plain, unpacked))
    layers = range(int(config["num_hidden_layers"]))
    linears = [its_family.in_layer(layer, part) for layer in layers for part in its_family.linears]
    if f"{its_family.lm_head}.weight" in unpacked:
        linears.append(its_family.lm_head)
    for linear in linears:
        asked = _is_quantised(linear, quantization)
        if asked != (linear in quantised):
            stored, should = ("unquantised", "quantised") if asked else ("quantised", "unquantised")
            raise CheckpointError(
                f"{linear} is {stored}, and config.json says that it is {should}; quantise the model again"
            )
    return f"{told}, complete, {len(quantised)} of them quantised ({quantization.get('format')})"


def _tensors(model: Path) -> dict[str, LazyTensor]:
    """Every tensor of every weight file. Raises CheckpointError for files that are not whole, or not all there."""
    whole, index = (model / WEIGHTS).is_file(), (model / INDEX).is_file()
    if whole and index:
        raise CheckpointError(
            f"both {WEIGHTS} and {INDEX} are there, and engines differ in which they read; delete one"
        )
    if not whole and not index:
        raise CheckpointError(f"there is no {WEIGHTS}; save the model as safetensors")
    places = None if whole else _weight_map(model)
    found: dict[str, LazyTensor] = {}
    for file in [WEIGHTS] if places is None else sorted(set(places.values())):
        if not (model / file).is_file():
            raise CheckpointError(f"the shard {file}, which {INDEX} names, is missing; copy it there")
        for name, (shape, dtype) in safetensors_file.shapes(model / file).items():
            if places is not None and places.get(name) != file:
                raise CheckpointError(f"{INDEX} has {name} in {places.get(name)}, and it is in {file}; save them again")
            found[name] = LazyTensor(shape, dtype, safetensors_file.loader(model / file, name))
    missing = sorted((places or {}).keys() - found)
    if missing:
        raise CheckpointError(f"{len(missing)} that {INDEX} names are in no shard, {missing[0]} first; save them again")
    return found


def _weight_map(model: Path) -> dict[str, str]:
    places = (read_json(model / INDEX) or {}).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{INDEX} has no weight_map of names to files; save the model again")
    if any(name != Path(name).name for name in places.values()):
        raise CheckpointError(f"{INDEX} names files outside the model's directory; save the model again")
    return places


def _without_tied_head(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Loaders tie the head to the embedding; a stored one must be just that."""
    rest = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    embedding = next((tensor for name, tensor in rest.items() if name.endswith("embed_tokens.weight")), None)
    if embedding is not None and not torch.equal(embedding.load(), tensors[HEAD].load()):
        raise CheckpointError(f"{HEAD} is not the embedding, and config.json says tie_word_embeddings; say false there")
    return rest


def _understood(quantization: Any) -> bool:
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "compressed-tensors":
        return False
    from compressed_tensors.quantization import QuantizationConfig

    try:
        QuantizationConfig.model_validate(dict(quantization))
    except ValueError as error:
        first = " ".join(str(error).split())[:160]
        raise CheckpointError(f"quantization_config can't be read ({first}); quantise the model again") from None
    groups = (quantization.get("config_groups") or {}).values()
    formats = {quantization.get("format"), *(group.get("format") for group in groups if isinstance(group, Mapping))}
    return formats <= {*UNPACKED, PACKED, None} and all(isinstance(group, Mapping) for group in groups)


def _unpacked(
    tensors: Mapping[str, LazyTensor], quantization: Mapping[str, Any]
) -> tuple[dict[str, LazyTensor], set[str]]:
    """(the tensors of the model before it was quantised, by shape; the modules that are). N output, K input width.

    Raises CheckpointError for a quantised weight without all of its tensors.
    """
    modules: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    found: dict[str, LazyTensor] = {}
    quantised = set()
    for module, parts in modules.items():
        weight = parts.get("weight")
        packed = "weight_packed" in parts
        if not packed and (weight is None or weight.dtype in family.FLOATS) and "weight_scale" not in parts:
            found |= {
                f"{module}.{part}": tensor
                for part, tensor in parts.items()
                if not (quantization.get("kv_cache_scheme") and part in ("k_scale", "v_scale"))
            }
            continue
        wanted = ("weight_packed", "weight_scale", "weight_shape") if packed else ("weight", "weight_scale")
        for part in wanted:
            if part not in parts:
                raise CheckpointError(f"{module}.{part} is missing; quantise the model again")
        shape = tuple(parts["weight_shape"].load().tolist()) if packed else parts["weight"].shape
        if len(shape) != 2:
            raise CheckpointError(f"{module} is quantised and no matrix ({_times(shape)}); quantise the model again")
        rows, columns = shape
        _require_fitting(module, rows, columns, parts, _bits(module, quantization) if packed else None)
        found[f"{module}.weight"] = LazyTensor((rows, columns), torch.bfloat16, torch.Tensor)
        found |= {f"{module}.{part}": tensor for part, tensor in parts.items() if part == "bias"}
        quantised.add(module)
    return found, quantised


def _require_fitting(module: str, rows: int, columns: int, parts: Mapping[str, LazyTensor], bits: int | None) -> None:
    """weight_packed [N, K·bits/32], weight_scale [1], [N] or [N, groups]."""
    if bits is not None and parts["weight_packed"].shape != (rows, math.ceil(columns * bits / 32)):
        raise CheckpointError(
            f"{module}.weight_packed is {_times(parts['weight_packed'].shape)}, and {bits} bits of {rows} × {columns} "
            f"want {rows} × {math.ceil(columns * bits / 32)}; quantise the model again"
        )
    scale = parts["weight_scale"].shape
    if scale and scale[0] not in (1, rows) and rows % scale[0]:
        raise CheckpointError(
            f"{module}.weight_scale is {_times(scale)}, which doesn't fit {rows} × {columns}; quantise the model again"
        )


def _is_quantised(module: str, quantization: Mapping[str, Any]) -> bool:
    """By the names in `ignore` and `targets`: a module's, a class's, or `re:` and a pattern."""
    if _named(module, quantization.get("ignore") or ()):
        return False
    return _group(module, quantization) is not None


def _group(module: str, quantization: Mapping[str, Any]) -> Mapping[str, Any] | None:
    groups: Iterable[Mapping[str, Any]] = (quantization.get("config_groups") or {}).values()
    for group in groups:
        aims = group.get("targets") or ()
        if "Linear" in aims or _named(module, aims):
            return group
    return None


def _bits(module: str, quantization: Mapping[str, Any]) -> int | None:
    bits = ((_group(module, quantization) or {}).get("weights") or {}).get("num_bits")
    return bits if isinstance(bits, int) else None


def _named(module: str, names: Iterable[str]) -> bool:
    try:
        return any(re.match(name[3:], module) if name.startswith("re:") else name == module for name in names)
    except re.error as error:
        raise CheckpointError(f"quantization_config holds a pattern that is none ({error}); correct it") from None


def _tokenizer(model: Path, config: Mapping[str, Any]) -> str:
    if not any((model / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"there is none ({', '.join(TOKENIZER_FILES)}); copy the base model's files there")
    if not (model / "tokenizer_config.json").is_file():
        raise CheckpointError("tokenizer_config.json is missing; copy the base model's there")
    largest = max(tokenizer_of(model).get_vocab().values(), default=-1)
    if largest >= int(config.get("vocab_size", largest + 1)):
        raise CheckpointError(
            f"its last token is {largest}, and the model has {config['vocab_size']} tokens; copy the base model's there"
        )
    return f"{largest + 1} tokens"


def _files(model: Path) -> str:
    shards = (read_json(model / INDEX) or {}).get("weight_map") or {}
    weights = {WEIGHTS} if (model / WEIGHTS).is_file() else {INDEX, *map(str, dict(shards).values())}
    names = sorted(path.name for path in model.iterdir())
    pickles = [name for name in names if _among(name, PICKLES)]
    if pickles:
        raise CheckpointError(f"{', '.join(pickles)}: pickles can run code when they are read; delete them")
    stray = [
        name
        for name in names
        if (name not in weights and not _among(name, (*ALLOWED, *OWN))) or not (model / name).is_file()
    ]
    if stray:
        raise CheckpointError(f"{', '.join(stray)} {'does' if len(stray) == 1 else 'do'} not belong there; delete it")
    left = [name for name in names if name in OWN]
    return f"{len(names) - len(left)}" + (f", and {', '.join(left)}, not to be packed" if left else "")


def _among(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _size(model: Path, most: float | None) -> str:
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e6
    if most is not None and size > most:
        raise CheckpointError(f"the weights are {size:.1f} MB, and at most {most:.1f} MB are allowed; compress more")
    return f"{size:.1f} MB" + ("" if most is None else f" of at most {most:.1f} MB")


def _version(config: Mapping[str, Any], wanted: str) -> str:
    found = config.get("transformers_version")
    if found != wanted:
        raise CheckpointError(f"config.json says {found}, and {wanted} is to read it; {_again(wanted)}")
    return wanted


def _form(model: Path, config: Mapping[str, Any], wanted: str) -> str:
    """Whether what `wanted` reads in the JSON files is what this version reads."""
    made = transformers_version.config_for(config, wanted)
    wrong = [f"config.json: {key}" for key in made if key != "transformers_version" and made[key] != config.get(key)]
    if transformers_version.in_old_form(wanted) and "dtype" in config:
        wrong.append("config.json: dtype")
    of_tokenizer = read_json(model / "tokenizer_config.json") or {}
    there = (model / "tokenizer.json").is_file()
    for key, value in transformers_version.tokenizer_config_for(of_tokenizer, wanted, tokenizer_json=there).items():
        if value != of_tokenizer.get(key):
            wrong.append(f"tokenizer_config.json: {key}")
    if wrong:
        raise CheckpointError(f"transformers {wanted} would misread {', '.join(wrong)}; {_again(wanted)}")
    return f"as transformers {wanted} reads it"


def _again(wanted: str) -> str:
    return f"export or compress it again with --for-transformers {wanted}"


def _loads(model: Path) -> str:
    """Stock transformers, a few tokens. Raises CheckpointError with its reason."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    require_memory(int(size * 1.2), "cpu", "loading the model")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        with torch.inference_mode():
            logits = loaded.eval()(torch.arange(min(4, loaded.config.vocab_size))[None], use_cache=False).logits
    except Exception as error:  # whatever the library raises for a directory from outside
        first = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise CheckpointError(f"stock transformers can't run it ({first}); export the model again") from None
    finally:
        if bars:
            logging.enable_progress_bar()
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[key]:
            first = str(sorted(map(str, info[key]))[0])
            raise CheckpointError(f"{len(info[key])} {key.replace('_', ' ')}, {first} first; export the model again")
    if not torch.isfinite(logits).all():
        raise CheckpointError(
            "its logits are not finite; the weights are damaged, or their dtype is too small for them"
        )
    return f"in transformers, {str(loaded.dtype).removeprefix('torch.')}"


# -- the zip -------------------------------------------------------------------------------------------------


def _write(path: Path, model: Path, names: Sequence[str], total: int, progress: Callable[[int, int], None]) -> None:
    done = 0
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in names:
            source = model / name
            entry = zipfile.ZipInfo(f"model/{name}", EPOCH)
            entry.create_system = 3  # Unix, also where it is written elsewhere: the modes below are its
            entry.external_attr = 0o100644 << 16
            entry.file_size = size = source.stat().st_size  # beyond 4 GiB another header is needed, and it comes first
            with source.open("rb") as reader, archive.open(entry, "w") as writer:
                copied = 0
                while block := reader.read(BLOCK):
                    writer.write(block)
                    copied += len(block)
                    progress(done + copied, total)
            if copied != size:
                raise UsageError(f"package: {source} changed while it was read; pack it again when it is written")
            done += size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_small(out: Path, size: int, most: float | None) -> None:
    if most is not None and size > most * 1e6:
        raise UsageError(
            f"package to {out}: {size / 1e6:.1f} MB exceed the limit of {most:.1f} MB (limits.max_zip_mb); nothing was "
            "written; compress more"
        )


def _require_disk(out: Path, needed: int) -> None:
    directory = next(parent for parent in out.resolve().parents if parent.exists())
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UsageError(
            f"package to {out}: needs {needed / 1e6:.1f} MB and {directory} has {free / 1e6:.1f} MB free; nothing was "
            "written; free some, or name another place"
        )


def _missing_parents(out: Path) -> list[Path]:
    """Directories that are to be made for `out`, the innermost first."""
    return [parent for parent in out.absolute().parents if not parent.exists()]


def _sweep(out: Path) -> None:
    """What others left there when they were killed."""
    prefix = f".{out.name}.package-"
    for left in out.parent.glob(f"{prefix}*"):
        pid = left.name.removeprefix(prefix)
        if pid.isdigit() and not process_alive(int(pid)):
            left.unlink(missing_ok=True)


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))
