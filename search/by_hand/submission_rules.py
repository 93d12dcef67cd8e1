"""Checks the submission list: the rules that a checkpoint must pass for a server's vLLM and transformers.

No code in the directory is run, and only safetensors, JSON and tokenizer files are read.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch

from compressors.errors import CheckpointError
from compressors.model import config_types, family, model_directory, safetensors_file, transformers_version
from compressors.model.checkpoint import (
    HEAD,
    TOKENIZER_FILES,
    Checkpoint,
    LazyTensor,
    stock_config,
)
from compressors.model.config_values import SIZES
from compressors.model.model_directory import INDEX, WEIGHTS, require_json
from compressors.plan import DESCRIPTION
from search.by_hand import quantized_tensors
from search.errors import UsageError
from search.files import read_json
from search.setup.machine import require_memory
from search.setup.texts import tokenizer_of

ALLOWED = (  # next to the weights
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
OWN = ("eval_result.json", "compression.json")  # optuna-search's notes on the model, which are not packed
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack")
MOST_LAYERS = 10_000  # transformers makes a list of them: a larger number could fill the memory


@dataclasses.dataclass(frozen=True)
class Rule:
    """Rule holds the outcome of one line of the list.

    Attributes:
        name: The name of the rule.
        ok: Whether the checkpoint passes it.
        found: What was found and, where the rule fails, what to do.
    """

    name: str
    ok: bool
    found: str


@dataclasses.dataclass(frozen=True)
class Target:
    """Target names the version of transformers whose rules a checkpoint is checked by.

    Attributes:
        version: The version.
        why: Why this one, as a clause.
    """

    version: str
    why: str

    def __str__(self) -> str:
        """Return a line for people; it names the submission server's version too, where this is another."""
        line = f"checked for transformers {self.version}, {self.why}"
        server = transformers_version.DEFAULT
        if self.version == server:
            return line
        return f"{line}; for the submission server's {server} write it again with --for-transformers {server}"


def target_of(model: Path, asked: str | None, study: str | None) -> Target:
    """Return what a checkpoint is checked for: what the user asks for, or else what it was written for.

    A checkpoint of another origin names no such version that can be relied on: transformers writes its own into every
    config.json. It is checked for what the study file exports for, or for the submission server.

    Args:
        model: The directory of the checkpoint.
        asked: The version that the user asks for.
        study: The version that the study file exports for.
    """
    if asked:
        return Target(asked, "as you asked")
    described = read_json(model_directory.behind(model / DESCRIPTION)) or {}
    if described.get("for_transformers"):
        return Target(str(described["for_transformers"]), "which it was written for")
    if "for_transformers" in described:  # null: for the version that wrote it, which config.json names
        named = (read_json(model_directory.behind(model / "config.json")) or {}).get("transformers_version")
        written_by = str(named) if transformers_version.is_known(named) else installed_version("transformers")
        return Target(written_by, "which it was written for")
    if study:
        return Target(study, "which the study file exports for")
    return Target(transformers_version.DEFAULT, "which the submission server has")


def check(
    model: Path, *, target: str | None = transformers_version.DEFAULT, max_model_mb: float | None = None
) -> list[Rule]:
    """Check a checkpoint and return every rule of the list, in order.

    Args:
        model: The directory of the checkpoint.
        target: The version of transformers that is to read it; None to require no version.
        max_model_mb: The largest size of the weights; 1 MB is 1e6 bytes.

    Raises:
        UsageError: There is no such directory.
        CheckpointError: The target is not a known version, or a link leads out of the directory.
    """
    model = Path(model)
    if not model.is_dir():
        raise UsageError(f"package: {model}: no such directory; name a checkpoint's, such as submit/model")
    model_directory.files_of(model, hub_cache=False)
    rules = [_rule("config.json", lambda: _config(model))]
    config = _object(model / "config.json") if rules[0].ok else {}
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
        rules.append(Rule("loads", False, "not tried; correct what is above first"))
    return rules


def _rule(name: str, look: Callable[[], str]) -> Rule:
    """Return a rule from its check, which returns what it found, or raises CheckpointError with what to do."""
    try:
        return Rule(name, True, look())
    except CheckpointError as error:
        return Rule(name, False, str(error).removeprefix(f"{name}: ").removeprefix(f"{name} "))
    except OSError as error:
        return Rule(name, False, f"{error.filename}: {error.strerror or error}; make it readable")


def _config(model: Path) -> str:
    path = model / "config.json"
    if not path.is_file():
        raise CheckpointError("is missing; copy it there, or export the model again")
    values = _object(path)
    for key in SIZES:
        if not isinstance(values.get(key), int):
            raise CheckpointError(
                f"says {key}: {values.get(key)!r:.60}, which must be a number; export the model again"
            )
    if values["num_hidden_layers"] > MOST_LAYERS:
        raise CheckpointError(
            f"says num_hidden_layers: {values['num_hidden_layers']}, which no model has; export the model again"
        )
    stock_config(values)
    config_types.require_config(model, values)
    return f"{values.get('model_type')}, {values.get('num_hidden_layers')} layers"


def _object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of the model. Raises CheckpointError, without the directory's name."""
    try:
        return require_json(path, "export the model again")
    except CheckpointError as error:
        reason = str(error).removeprefix(f"model {path.parent}: ").removeprefix(f"{path.name} ")
        raise CheckpointError(f"{path.name} is not a JSON object: {reason}") from None


def _weights(model: Path, config: Mapping[str, Any]) -> str:
    """Check that the tensors are those of the stock model of this config, in its shapes, and no others."""
    tensors = _tensors(model)
    summary = f"{len(tensors)} tensors in safetensors"
    if config.get("model_type") not in family.names():
        return (
            f"{summary}; {config.get('model_type')} is not known here, so only loading shows whether they are complete"
        )
    if config.get("tie_word_embeddings") and HEAD in tensors:
        tensors = _without_tied_head(tensors)
    quantization = config.get("quantization_config")
    if not quantization:
        family.family_of(Checkpoint(copy.deepcopy(dict(config)), tensors))
        return f"{summary}, complete"
    if not quantized_tensors.understood(quantization):
        how = quantization.get("format") or quantization.get("quant_method")
        return f"{summary}; {how} is not known here, so only loading shows whether they are complete"
    plain = copy.deepcopy({key: value for key, value in config.items() if key != "quantization_config"})
    unpacked, quantized = quantized_tensors.unpacked(tensors, quantization)
    its_family = family.family_of(Checkpoint(plain, unpacked))
    layers = range(int(config["num_hidden_layers"]))
    linears = [its_family.in_layer(layer, part) for layer in layers for part in its_family.linears]
    if f"{its_family.lm_head}.weight" in unpacked:
        linears.append(its_family.lm_head)
    for linear in linears:
        asked = quantized_tensors.is_quantized(linear, quantization)
        if asked != (linear in quantized):
            stored, should = ("unquantized", "quantized") if asked else ("quantized", "unquantized")
            raise CheckpointError(
                f"{linear} is {stored}, and config.json says that it is {should}; quantize the model again"
            )
    return f"{summary}, complete, {len(quantized)} of them quantized ({quantization.get('format')})"


def _tensors(model: Path) -> dict[str, LazyTensor]:
    """Return the tensors of all weight files. Raises CheckpointError for files that are cut off or missing."""
    single, index = (model / WEIGHTS).is_file(), (model / INDEX).is_file()
    if single and index:
        raise CheckpointError(
            f"both {WEIGHTS} and {INDEX} are there, and engines differ in which one they read; delete one"
        )
    if not single and not index:
        raise CheckpointError(f"there is no {WEIGHTS}; save the model as safetensors")
    places = None if single else _weight_map(model)
    tensors: dict[str, LazyTensor] = {}
    for file in [WEIGHTS] if places is None else sorted(set(places.values())):
        if not (model / file).is_file():
            raise CheckpointError(f"the shard {file}, which {INDEX} names, is missing; copy it there")
        for name, (shape, dtype) in safetensors_file.shapes(model / file).items():
            if places is not None and places.get(name) != file:
                raise CheckpointError(f"{INDEX} has {name} in {places.get(name)}, and it is in {file}; save them again")
            tensors[name] = LazyTensor(shape, dtype, safetensors_file.loader(model / file, name))
    missing = sorted((places or {}).keys() - tensors)
    if missing:
        raise CheckpointError(f"{len(missing)} that {INDEX} names are in no shard, {missing[0]} first; save them again")
    return tensors


def _weight_map(model: Path) -> dict[str, str]:
    places = _object(model / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{INDEX} has no weight_map of names to files; save the model again")
    if any(name != Path(name).name for name in places.values()):
        raise CheckpointError(f"{INDEX} names files outside the model's directory; save the model again")
    return places


def _without_tied_head(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors without the head, which loaders tie to the embedding: a stored one must be equal to it."""
    rest = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    embedding = next((tensor for name, tensor in rest.items() if name.endswith("embed_tokens.weight")), None)
    if embedding is not None and not torch.equal(embedding.load(), tensors[HEAD].load()):
        raise CheckpointError(f"{HEAD} is not the embedding, and config.json sets tie_word_embeddings; set it to false")
    return rest


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
    single = (model / WEIGHTS).is_file() or not (model / INDEX).is_file()
    weights = {WEIGHTS} if single else {INDEX, *_weight_map(model).values()}
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
    """Check that transformers `wanted` reads the JSON files as this version does."""
    read = transformers_version.config_for(config, wanted)
    wrong = [f"config.json: {key}" for key in read if key != "transformers_version" and read[key] != config.get(key)]
    if transformers_version.in_old_form(wanted) and "dtype" in config:
        wrong.append("config.json: dtype")
    tokenizer = _object(model / "tokenizer_config.json") if (model / "tokenizer_config.json").is_file() else {}
    fast = (model / "tokenizer.json").is_file()
    for key, value in transformers_version.tokenizer_config_for(tokenizer, wanted, tokenizer_json=fast).items():
        if value != tokenizer.get(key):
            wrong.append(f"tokenizer_config.json: {key}")
    if wrong:
        raise CheckpointError(f"transformers {wanted} would misread {', '.join(wrong)}; {_again(wanted)}")
    return f"as transformers {wanted} reads it"


def _again(wanted: str) -> str:
    return f"export or compress it again with --for-transformers {wanted}"


def _loads(model: Path) -> str:
    """Check that stock transformers loads the checkpoint, with all of its tensors, and gives finite logits."""
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
    except Exception as error:  # the library may raise anything for a directory from elsewhere
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
