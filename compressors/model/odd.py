"""Tell which models `Checkpoint.read` understands, and some stock loaders don't."""

from __future__ import annotations

from pathlib import Path

from compressors.errors import CheckpointError
from compressors.model import weight_names
from compressors.model.config_values import settled
from compressors.model.family import names
from compressors.model.model_directory import require_json, weight_files
from compressors.model.shards import stored_weights


def is_odd(path: Path) -> bool:
    """Return whether a model of a known family has values or names of weights that not every stock loader reads."""
    config = require_json(path / "config.json", "a model's directory holds config.json")
    if config.get("model_type") not in names():
        return False
    try:
        stored = stored_weights(weight_files(path))
        return weight_names.with_prefix(stored).keys() != stored.keys() or settled(config) != config
    except CheckpointError:  # Checkpoint.read tells it
        return False
