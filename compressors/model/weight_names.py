"""Tell whose names a checkpoint's weights have, and what is wrong with those that a family doesn't know."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

PREFIX = "model."  # what the names of a class with a head begin with, and those of its base class lack
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head."
ORIGINS = {  # what wraps a model, by what its saved names begin with
    "_orig_mod.": "torch.compile",
    "module.": "a distributed trainer",
    "base_model.": "an adapter library",
    "_fsdp_wrapped_module.": "a distributed trainer",
    "_forward_module.": "a distributed trainer",
    "language_model.": "a model that also reads images",
    "model.language_model.": "a model that also reads images",
    "transformer.": "another architecture",
}
ADAPTERS = re.compile(r"lora_[AB]|lora_embedding|\.base_layer\.|modules_to_save")
LAYER = re.compile(r"^model\.layers\.(\d{1,6})\.")

Value = TypeVar("Value")


def with_prefix(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Return the tensors of a model that was saved from its base class under the names of the class with a head."""
    if EMBEDDING not in tensors or any(name.startswith(PREFIX) for name in tensors):
        return dict(tensors)
    return {name if name.startswith(HEAD) else f"{PREFIX}{name}": value for name, value in tensors.items()}


def of_class_with_head(config: dict[str, Any], tensors: Mapping[str, Value]) -> tuple[dict[str, Any], dict[str, Value]]:
    """Return config.json and tensors as the class with a head saves them; the given ones if it has saved them."""
    named = with_prefix(tensors)
    architectures = config.get("architectures")
    of_base = isinstance(architectures, list) and all(str(name).endswith("Model") for name in architectures)
    if named.keys() != tensors.keys() and of_base:
        config = {key: value for key, value in config.items() if key != "architectures"}
    return config, named


def why_unknown(expected: Collection[str], stored: Collection[str], layers: int) -> str | None:
    """Return why a checkpoint's names are not the expected ones, and what to do; None where no reason is known.

    Args:
        expected: The names of the weights that config.json asks for.
        stored: The names of the weights that are stored.
        layers: The num_hidden_layers of config.json.
    """
    adapter = next((name for name in sorted(stored) if ADAPTERS.search(name)), None)
    if adapter is not None:
        return f"they hold an adapter ({adapter}); merge it into the model, and save the whole model"
    return _why_prefixed(expected, stored) or _why_layers(expected, stored, layers)


def _why_prefixed(expected: Collection[str], stored: Collection[str]) -> str | None:
    """Return what is in front of the names of weights that are missing."""
    for name in sorted(set(expected) - set(stored)):
        bare = name.removeprefix(PREFIX)
        for other in sorted(stored):
            if other == bare and name != bare:
                lacking = sum(f"{PREFIX}{one}" in expected for one in stored)
                return (
                    f'{lacking} names lack "{PREFIX}" ({bare} is there, and not {name}); save them from the class '
                    f'with a head, or put "{PREFIX}" in front of them'
                )
            if other.endswith(f".{bare}") and other not in expected and not LAYER.match(other):
                front = other.removesuffix(bare)
                return _foreign(front, f"{other} for {name}")
    if not set(expected) & set(stored) and stored:
        first = min(stored)
        begin = next((begin for begin in ORIGINS if first.startswith(begin)), None)
        if begin is not None:
            return _foreign(begin, f"{first}, for one")
        return f"none of the names is known, {first} first; use config.json and weights of the same model"
    return None


def _foreign(front: str, example: str) -> str:
    origin = next((told for begin, told in ORIGINS.items() if front.startswith(begin)), None)
    saved = f", as {origin} saves them" if origin else ""
    return f'their names begin with "{front}"{saved} ({example}); save the model itself, or rename them'


def _why_layers(expected: Iterable[str], stored: Iterable[str], layers: int) -> str | None:
    """Return how the stored layers differ from those that config.json counts."""
    known = {int(found[1]) for name in expected if (found := LAYER.match(name))}
    kept = {int(found[1]) for name in stored if (found := LAYER.match(name))}
    if not kept or kept == known:
        return None
    last = max(kept)
    gaps = sorted(set(range(last)) - kept)
    if gaps:
        return (
            f"layer {gaps[0]} of the layers 0 to {last} is missing; copy or download the weights again, or number the "
            "layers without gaps"
        )
    return (
        f"they hold {len(kept)} layers, and config.json has num_hidden_layers: {layers}; use config.json and "
        "weights of the same model"
    )
