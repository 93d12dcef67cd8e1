"""What another version of transformers reads: config.json and the two files beside it, in the form of that version.

transformers 5 writes the rotary embedding's numbers as `rope_parameters` alone. 4.x doesn't know the key: it reads
`rope_theta` and `rope_scaling`, finds neither, and computes with rope_theta 10000 and no scaling, without a word; vLLM
0.14.1, which runs on it, does the same. Knows no weights: they are the same for every version.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from compressors.errors import CheckpointError
from compressors.model import family

DEFAULT = "4.57.3"
OLD = (Version("4.55"), Version("4.58"))  # from, and up to without it: compared with 4.57.3 itself
NEW = (Version("5.16"), Version("6"))  # what optuna-search runs on
KNOWN = "4.55 to 4.57 and 5.16 to 5.x"
DEFAULT_THETA = 10_000.0  # where a config names none, and its class has no other

# What 4.57 computes just as 5.x does: (keys that it wants, keys that it also knows). longrope is not among them: 4.57
# reads its original length from elsewhere.
ROPE_TYPES: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset({"original_max_position_embeddings"})),
    "yarn": (
        frozenset({"factor"}),
        frozenset(
            {
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "original_max_position_embeddings",
                "truncate",
            }
        ),
    ),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
}
# Of compressed-tensors 0.13, which vLLM 0.14.1 pins; it refuses any other key, even one that is null.
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
# Its get_quant_method in 0.14.1, 0.17.1, 0.18.1, 0.19.1 and 0.20.0
NO_LM_HEAD = "vLLM reads no 8-bit lm_head before 0.20"
TOKENIZER_NOISE = ("backend", "is_local", "local_files_only")  # transformers 5 notes for itself how it loaded them
FAST_TOKENIZER = "PreTrainedTokenizerFast"  # tokenizer.json as it is; known to every version


def config_for(config: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The config.json that `version` reads as the running transformers reads `config`; again on its result: the same.

    version: 4.55 to 4.57 or 5.16 to 5.x. Raises CheckpointError for another one, and for what `version` can't express.
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
            f"for transformers {version}: per_layer_config gives layers sizes of their own, which it doesn't know; "
            "choose the same size for every layer"
        )
    made = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "per_layer_config")}
    made |= _rope(config, version)
    made |= _dtype(config, version)
    made["head_dim"] = family.head_dim(config)
    if isinstance(config.get("quantization_config"), Mapping):
        made["quantization_config"] = _quantization(config["quantization_config"], version)
    made["transformers_version"] = version
    return made


def generation_config_for(config: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The generation_config.json for `version`: it ignores keys that it doesn't know. Raises CheckpointError."""
    in_old_form(version)
    return {**config, "transformers_version": version}


def tokenizer_config_for(config: Mapping[str, Any], version: str, *, tokenizer_json: bool) -> dict[str, Any]:
    """The tokenizer_config.json for `version`.

    tokenizer_json: whether that file is there: all that the classes of transformers 5 need. Raises CheckpointError.
    """
    if not in_old_form(version):
        return dict(config)
    made = {key: value for key, value in config.items() if key not in TOKENIZER_NOISE}
    name = str(config.get("tokenizer_class"))
    if name.endswith("Backend"):
        if not tokenizer_json:
            raise CheckpointError(
                f"for transformers {version}: tokenizer_config.json names the class {name}, which it doesn't know, and "
                "there is no tokenizer.json to use instead; save the tokenizer as a fast one"
            )
        made["tokenizer_class"] = FAST_TOKENIZER
    if isinstance(config.get("extra_special_tokens"), list):  # 4.x has a dict of names there, and fails on a list
        del made["extra_special_tokens"]
        made["additional_special_tokens"] = [
            *(config.get("additional_special_tokens") or []),
            *config["extra_special_tokens"],
        ]
    if isinstance(config.get("model_specific_special_tokens"), Mapping):
        made["extra_special_tokens"] = dict(made.pop("model_specific_special_tokens"))
    return made


def retarget(directory: Path, version: str) -> list[str]:
    """Rewrite a checkpoint's JSON files so that `version` reads them right; the weights stay as they are.

    Returns what changed, a short statement each; nothing where it was so already. Every file is made before the first
    is put in its place. Raises CheckpointError, and then nothing was changed.
    """
    in_old_form(version)
    directory = Path(directory)
    tokenizer_json = (directory / "tokenizer.json").is_file()
    makers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "config.json": lambda values: config_for(values, version),
        "generation_config.json": lambda values: generation_config_for(values, version),
        "tokenizer_config.json": lambda values: tokenizer_config_for(values, version, tokenizer_json=tokenizer_json),
    }
    made, said = {}, []
    for name, make in makers.items():
        path = directory / name
        if name != "config.json" and not path.is_file():
            continue
        before = _read(path)
        after = make(before)
        if after != before:
            made[path] = after
            said += [f"{name}: {change}" for change in _changes(before, after)]
    _replace(made, version)
    return said


def in_old_form(version: str) -> bool:
    """Whether `version` of transformers reads the form of 4.x. Raises CheckpointError for one that isn't known here."""
    try:
        parsed = Version(version)
    except InvalidVersion:
        raise CheckpointError(f"for transformers {version!r}: is no version; known are {KNOWN}") from None
    for first, end in (OLD, NEW):
        if first <= parsed < end:
            return end is OLD[1]
    raise CheckpointError(f"for transformers {version}: is not known here; known are {KNOWN}")


def _rope(config: Mapping[str, Any], version: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, or nothing where the config names no number of the rotary embedding."""
    if not config.keys() & {"rope_parameters", "rope_scaling", "rope_theta"}:
        return {}
    thetas, scalings = {}, {}
    for key in ("rope_parameters", "rope_scaling"):  # transformers 5 puts its rope_theta into either
        given = config.get(key) or {}
        if not isinstance(given, Mapping):
            raise CheckpointError(f"for transformers {version}: {key} is {given!r}; it must be an object")
        if any(isinstance(value, Mapping) for value in given.values()):
            raise CheckpointError(
                f"for transformers {version}: {key} differ by the type of layer ({', '.join(given)}), and it has one "
                "rope_theta and one rope_scaling; this model can't be exported for it"
            )
        if given:
            scalings[key] = _scaling(given, version)
        if "rope_theta" in given:
            thetas[f"{key}.rope_theta"] = given["rope_theta"]
    if "rope_theta" in config:
        thetas["rope_theta"] = config["rope_theta"]
    for found in (thetas, scalings):
        if any(value != next(iter(found.values())) for value in found.values()):
            said = ", ".join(f"{key}: {value}" for key, value in found.items())
            raise CheckpointError(
                f"for transformers {version}: config.json contradicts itself ({said}); take out the one that is wrong"
            )
    return {
        "rope_theta": next(iter(thetas.values())) if thetas else _default_theta(config),
        "rope_scaling": next(iter(scalings.values()), None),
    }


def _default_theta(config: Mapping[str, Any]) -> float:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        return DEFAULT_THETA
    theta = getattr(CONFIG_MAPPING[model_type], "default_theta", DEFAULT_THETA)
    return float(
        theta.get("global", DEFAULT_THETA) if isinstance(theta, Mapping) else theta
    )  # Gemma's local one has a key of its own


def _scaling(given: Mapping[str, Any], version: str) -> dict[str, Any] | None:
    """4.x's `rope_scaling` with its `rope_type`, or None where nothing is scaled."""
    other = ("rope_type", "type", "rope_theta")
    values = {key: value for key, value in given.items() if key not in other and value is not None}
    rope_type = given.get("rope_type") or given.get("type") or "default"
    if values.get("partial_rotary_factor") == 1:
        del values["partial_rotary_factor"]
    if rope_type == "default" and set(values) <= {"original_max_position_embeddings"}:
        return None
    if rope_type != "default" and rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"for transformers {version}: rope_type {rope_type!r} can't be expressed; known are default, "
            f"{', '.join(ROPE_TYPES)}"
        )
    wanted, known = ROPE_TYPES.get(rope_type, (frozenset[str](), frozenset[str]()))
    unknown, missing = sorted(values.keys() - wanted - known), sorted(wanted - values.keys())
    if unknown or missing:
        said = [f"has no {', '.join(missing)}"] if missing else []
        said += [f"says {', '.join(unknown)}, which it doesn't know"] if unknown else []
        raise CheckpointError(
            f"for transformers {version}: the rotary embedding ({rope_type}) {' and '.join(said)}; this model can't be "
            "exported for it"
        )
    return {"rope_type": rope_type, **values}


def _dtype(config: Mapping[str, Any], version: str) -> dict[str, Any]:
    new, old = config.get("dtype"), config.get("torch_dtype")
    if new and old and new != old:
        raise CheckpointError(
            f"for transformers {version}: config.json says dtype: {new} and torch_dtype: {old}; take out the one that "
            "is wrong"
        )
    return {"torch_dtype": new or old} if new or old else {}


def _quantization(given: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Without keys of newer compressed-tensors that say nothing; those that say something are refused."""
    made = dict(given)
    if given.get("quant_method") != "compressed-tensors":
        return made
    groups = given.get("config_groups") or {}
    formats = {given.get("format"), *(group.get("format") for group in groups.values() if isinstance(group, Mapping))}
    newer = sorted(str(name) for name in formats - QUANTIZATION_FORMATS - {None})
    if newer:
        raise CheckpointError(
            f"for transformers {version}: its compressed-tensors doesn't know the format {newer[0]}; known are "
            f"{', '.join(sorted(QUANTIZATION_FORMATS))}"
        )
    if _quantises_lm_head(given):
        raise CheckpointError(
            f"for transformers {version}: {NO_LM_HEAD}; choose lm_head: 16-bit, or for_transformers of 5.x where the "
            "server has a newer vLLM"
        )
    made["config_groups"] = {name: _scheme(group, version) for name, group in groups.items()}
    if isinstance(given.get("kv_cache_scheme"), Mapping):
        made["kv_cache_scheme"] = _known(given["kv_cache_scheme"], QUANTIZATION_ARGS, version)
    return made


def _quantises_lm_head(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config names lm_head as a target, as it must: to vLLM it is no Linear."""
    groups = (quantization.get("config_groups") or {}).values()
    return any("lm_head" in (group.get("targets") or ()) for group in groups if isinstance(group, Mapping))


def _scheme(group: Any, version: str) -> Any:
    if not isinstance(group, Mapping):  # the name of a preset, or a list of layers
        return group
    made = _known(group, QUANTIZATION_SCHEME, version)
    for part in ("weights", "input_activations", "output_activations"):
        if isinstance(made.get(part), Mapping):
            made[part] = _known(made[part], QUANTIZATION_ARGS, version)
    return made


def _known(values: Mapping[str, Any], names: frozenset[str], version: str) -> dict[str, Any]:
    for key in values.keys() - names:
        if values[key] is not None:
            raise CheckpointError(
                f"for transformers {version}: quantization_config says {key}: {values[key]!r}, which its "
                "compressed-tensors doesn't know; quantise with a scheme that needs no such key"
            )
    return {key: value for key, value in values.items() if key in names}


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What a person wants to know of two versions of a file."""
    said = []
    gone = [key for key in before if key not in after]
    come = [key for key in after if key not in before]
    for old, new in (
        ("rope_parameters", ("rope_theta", "rope_scaling")),
        ("dtype", ("torch_dtype",)),
        ("extra_special_tokens", ("additional_special_tokens",)),
        ("model_specific_special_tokens", ("extra_special_tokens",)),
    ):
        if old in gone and any(key in after for key in new):
            gone.remove(old)
            come = [key for key in come if key not in new]
            said.append(f"{old} → {', '.join(new)}")
    said += [f"{key} added" for key in come if key != "transformers_version"]
    said += [f"{key} dropped" for key in gone]
    for key in ("quantization_config", "tokenizer_class", "rope_scaling", "transformers_version"):
        if key in after and before.get(key) != after[key] and (key in before or key == "transformers_version"):
            short = not isinstance(after[key], Mapping)
            said.append(f"{key} {before.get(key)} → {after[key]}" if short else f"{key} rewritten")
    return said


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"model {path.parent}: has no {path.name}; name a checkpoint's directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"model {path.parent}: {path.name} can't be read ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"model {path.parent}: {path.name} is no JSON object")
    return values


def _replace(made: Mapping[Path, Mapping[str, Any]], version: str) -> None:
    """Every file is written beside its place first, so that a full disk leaves them all as they were."""
    written: dict[Path, Path] = {}
    try:
        for path, values in made.items():
            with tempfile.NamedTemporaryFile(
                "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
            ) as out:
                written[Path(out.name)] = path
                json.dump(values, out, indent=2, sort_keys=True, ensure_ascii=False)
                out.write("\n")
        for scratch, path in written.items():
            scratch.chmod(0o644)
            scratch.replace(path)
    except OSError as error:
        where = error.filename or next(iter(made)).parent
        raise CheckpointError(f"for transformers {version}: {where}: {error.strerror or error}") from None
    finally:
        for scratch in written:
            scratch.unlink(missing_ok=True)
