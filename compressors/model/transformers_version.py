"""Rewrite config.json and the tokenizer's and generation's JSON for another version of transformers.

transformers 5 writes the rotary embedding's settings only as `rope_parameters`. 4.x doesn't know that key: it reads
`rope_theta` and `rope_scaling`, misses both, and silently computes with rope_theta 10000 and no scaling. vLLM 0.14.1,
which runs on 4.x, does the same. Weights are the same for every version and are not touched.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from compressors.errors import CheckpointError
from compressors.files import written_whole
from compressors.model import family
from compressors.model.config_values import stated_dtype
from compressors.model.model_directory import require_json
from compressors.model.old_rope import old_rope

DEFAULT = "4.57.3"
OLD = (Version("4.55"), Version("4.58"))  # [first, end): checked against 4.57.3 itself
NEW = (Version("5.16"), Version("6"))  # [first, end): what optuna-search runs on
KNOWN = "4.55 to 4.57 and 5.16 to 5.x"
# What compressed-tensors 0.13 knows, which vLLM 0.14.1 pins; it refuses any other key, even with the value null.
QUANTIZATION_FORMATS = frozenset(
    {
        "dense",
        "float-quantized",
        "int-quantized",
        "marlin-24",
        "mixed-precision",
        "mxfp4-pack-quantized",
        "naive-quantized",
        "nvfp4-pack-quantized",
        "pack-quantized",
    }
)
QUANTIZATION_SCHEME = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
QUANTIZATION_ARGS = frozenset(
    {
        "num_bits",
        "type",
        "symmetric",
        "group_size",
        "strategy",
        "block_structure",
        "dynamic",
        "actorder",
        "scale_dtype",
        "zp_dtype",
        "observer",
        "observer_kwargs",
    }
)
# Checked in get_quant_method of vLLM 0.14.1, 0.17.1, 0.18.1, 0.19.1 and 0.20.0.
NO_LM_HEAD = "vLLM reads no 8-bit lm_head before 0.20"
TOKENIZER_NOISE = ("backend", "is_local", "local_files_only")  # how transformers 5 loaded the tokenizer
FAST_TOKENIZER = "PreTrainedTokenizerFast"  # runs any tokenizer.json; every version has it


def config_for(config: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Return the config.json that `version` reads as the running transformers reads `config`; idempotent.

    Args:
        config: The values of config.json, in either form.
        version: A version from 4.55 to 4.57 or from 5.16 to 5.x.

    Raises:
        CheckpointError: For another version, and for what `version` can't express.
    """
    if not in_old_form(version):
        return {**config, "transformers_version": version}
    model_type = config.get("model_type")
    if model_type not in family.names():
        raise CheckpointError(
            f"for transformers {version}: model_type {model_type!r} is not known here; known are "
            f"{', '.join(family.names())}"
        )
    if config.get("per_layer_config"):
        raise CheckpointError(
            f"for transformers {version}: per_layer_config gives layers their own sizes, which this version doesn't "
            "know; choose the same size for every layer"
        )
    old = {
        key: value
        for key, value in config.items()
        if key not in ("rope_parameters", "dtype", "torch_dtype", "per_layer_config")
    }
    old |= old_rope(config, version, _way_out())
    old |= _dtype(config, version)
    old["head_dim"] = family.head_dim(config)
    if isinstance(config.get("quantization_config"), Mapping):
        old["quantization_config"] = _quantization(config["quantization_config"], version)
    old["transformers_version"] = version
    return old


def generation_config_for(config: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Return the generation_config.json for `version`, which ignores unknown keys.

    Raises:
        CheckpointError: For an unknown version.
    """
    in_old_form(version)
    return {**config, "transformers_version": version}


def tokenizer_config_for(config: Mapping[str, Any], version: str, *, tokenizer_json: bool) -> dict[str, Any]:
    """Return the tokenizer_config.json for `version`.

    Args:
        config: The values of tokenizer_config.json.
        version: A version of transformers, as in `config_for`.
        tokenizer_json: Whether tokenizer.json exists, which is all that the classes of transformers 5 need.

    Raises:
        CheckpointError: For an unknown version, and a tokenizer class that `version` can't load.
    """
    if not in_old_form(version):
        return dict(config)
    old = {key: value for key, value in config.items() if key not in TOKENIZER_NOISE}
    name = str(config.get("tokenizer_class"))
    if name.endswith("Backend"):
        if not tokenizer_json:
            raise CheckpointError(
                f"for transformers {version}: tokenizer_config.json names the class {name}, which it doesn't know, and "
                "there is no tokenizer.json to use instead; save the tokenizer as a fast one"
            )
        old["tokenizer_class"] = FAST_TOKENIZER
    if isinstance(config.get("extra_special_tokens"), list):  # 4.x expects a dict of names, and fails on a list
        del old["extra_special_tokens"]
        old["additional_special_tokens"] = [
            *(config.get("additional_special_tokens") or []),
            *config["extra_special_tokens"],
        ]
    if isinstance(config.get("model_specific_special_tokens"), Mapping):
        old["extra_special_tokens"] = dict(old.pop("model_specific_special_tokens"))
    return old


def retarget(directory: Path, version: str) -> list[str]:
    """Rewrite a checkpoint's JSON files so that `version` reads them correctly; the weights are not touched.

    All files are written before the first one takes its place.

    Returns:
        A short statement per change; empty where the files are in that form already.

    Raises:
        CheckpointError: As `config_for` and `tokenizer_config_for`, and when a file can't be read or written; then
            nothing is changed.
    """
    in_old_form(version)
    directory = Path(directory)
    tokenizer_json = (directory / "tokenizer.json").is_file()
    makers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "config.json": lambda values: config_for(values, version),
        "generation_config.json": lambda values: generation_config_for(values, version),
        "tokenizer_config.json": lambda values: tokenizer_config_for(values, version, tokenizer_json=tokenizer_json),
    }
    rewritten, changes = {}, []
    for name, make in makers.items():
        path = directory / name
        if name != "config.json" and not path.is_file():
            continue
        before = require_json(path, "name a checkpoint's directory")
        after = make(before)
        if after != before:
            rewritten[path] = after
            changes += [f"{name}: {change}" for change in _changes(before, after)]
    _replace(rewritten, version)
    return changes


def in_old_form(version: str) -> bool:
    """Return whether `version` of transformers reads the form of 4.x.

    Raises:
        CheckpointError: For an unknown version.
    """
    try:
        parsed = Version(version)
    except InvalidVersion:
        raise CheckpointError(f"for transformers {version!r}: is not a version number; known are {KNOWN}") from None
    for first, end in (OLD, NEW):
        if first <= parsed < end:
            return end is OLD[1]
    raise CheckpointError(f"for transformers {version}: is not a known version; known are {KNOWN}")


def _way_out() -> str:
    running = importlib.metadata.version("transformers")
    return f"choose --for-transformers {running}, or export.for_transformers=null"


def is_known(version: object) -> bool:
    """Return whether a value is a version of transformers that files can be written for."""
    try:
        in_old_form(str(version))
    except CheckpointError:
        return False
    return True


def _dtype(config: Mapping[str, Any], version: str) -> dict[str, Any]:
    stated = stated_dtype(config, f"for transformers {version}: ")
    return {} if stated is None else {"torch_dtype": stated}


def _quantization(given: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Drop keys of newer compressed-tensors whose value is null, and refuse those with a value."""
    known = dict(given)
    if given.get("quant_method") != "compressed-tensors":
        return known
    groups = given.get("config_groups") or {}
    formats = {given.get("format"), *(group.get("format") for group in groups.values() if isinstance(group, Mapping))}
    newer = sorted(str(name) for name in formats - QUANTIZATION_FORMATS - {None})
    if newer:
        raise CheckpointError(
            f"for transformers {version}: its compressed-tensors doesn't know the format {newer[0]}; known are "
            f"{', '.join(sorted(QUANTIZATION_FORMATS))}"
        )
    if _quantizes_lm_head(given):
        raise CheckpointError(
            f"for transformers {version}: {NO_LM_HEAD}; choose lm_head: 16-bit, or for_transformers of 5.x where the "
            "server has a newer vLLM"
        )
    known["config_groups"] = {name: _scheme(group, version) for name, group in groups.items()}
    if isinstance(given.get("kv_cache_scheme"), Mapping):
        known["kv_cache_scheme"] = _known(given["kv_cache_scheme"], QUANTIZATION_ARGS, version)
    return known


def _quantizes_lm_head(quantization: Mapping[str, Any]) -> bool:
    """Return whether a quantization_config names lm_head as a target; for vLLM it is no Linear, so it must be named."""
    groups = (quantization.get("config_groups") or {}).values()
    return any("lm_head" in (group.get("targets") or ()) for group in groups if isinstance(group, Mapping))


def _scheme(group: Any, version: str) -> Any:
    if not isinstance(group, Mapping):  # the name of a preset, or a list of layers
        return group
    scheme = _known(group, QUANTIZATION_SCHEME, version)
    for part in ("weights", "input_activations", "output_activations"):
        if isinstance(scheme.get(part), Mapping):
            scheme[part] = _known(scheme[part], QUANTIZATION_ARGS, version)
    return scheme


def _known(values: Mapping[str, Any], names: frozenset[str], version: str) -> dict[str, Any]:
    for key in values.keys() - names:
        if values[key] is not None:
            raise CheckpointError(
                f"for transformers {version}: quantization_config has {key}: {values[key]!r}, which its "
                "compressed-tensors doesn't know; quantize with a scheme that needs no such key"
            )
    return {key: value for key, value in values.items() if key in names}


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what differs between two versions of a file, for people."""
    statements = []
    gone = [key for key in before if key not in after]
    come = [key for key in after if key not in before]
    for old, new in (
        ("rope_parameters", ("rope_theta", "rope_scaling", "rope_local_base_freq")),
        ("dtype", ("torch_dtype",)),
        ("extra_special_tokens", ("additional_special_tokens",)),
        ("model_specific_special_tokens", ("extra_special_tokens",)),
    ):
        if old in gone and any(key in after for key in new):
            gone.remove(old)
            come = [key for key in come if key not in new]
            statements.append(f"{old} → {', '.join(key for key in new if key in after)}")
    statements += [f"{key} added" for key in come if key != "transformers_version"]
    statements += [f"{key} dropped" for key in gone]
    for key in ("quantization_config", "tokenizer_class", "rope_scaling", "transformers_version"):
        if key in after and before.get(key) != after[key] and (key in before or key == "transformers_version"):
            short = not isinstance(after[key], Mapping)
            statements.append(f"{key} {before.get(key)} → {after[key]}" if short else f"{key} rewritten")
    return statements


def _replace(rewritten: Mapping[Path, Mapping[str, Any]], version: str) -> None:
    """Write all files before the first one takes its place, so that a full disk leaves them all unchanged."""
    try:
        with contextlib.ExitStack() as renames:
            for path, values in rewritten.items():
                text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
                renames.enter_context(written_whole(path)).write_text(text, encoding="utf-8")
    except OSError as error:
        where = error.filename or next(iter(rewritten)).parent
        raise CheckpointError(
            f"for transformers {version}: {where}: {error.strerror or error}; free some space, or make it writable"
        ) from None
