"""Checks checkpoints that were built earlier against the digests in their compression.json."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressors import cached
from compressors.model.checkpoint import Checkpoint
from compressors.model.config_values import SIZES
from compressors.model.model_directory import require_json
from compressors.plan import DESCRIPTION
from evaluator import checkpoint_files
from evaluator.errors import EvaluationError

KEYS = ("model_type", "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", *SIZES)  # of config.json


def read(path: Path, expected: Checkpoint | None = None) -> dict[str, Any]:
    """Return the compression.json of a checkpoint, after its weights were compared with the digest there.

    Args:
        path: The directory.
        expected: A checkpoint with the same sizes and tokenizer files, where that is known.

    Raises:
        FileNotFoundError: When there is no such directory.
        OSError, ValueError: When it is damaged: the message says what is wrong.
    """
    if not path.is_dir():
        path.stat()
        raise ValueError("it is no directory")
    try:
        described = cached.read_json(path / DESCRIPTION)
        config = require_json(path / "config.json", "")
        if described["weights_sha256"] != checkpoint_files.weights_sha256_of(path):
            raise ValueError("its weights are not those that were written")
        if expected is not None:
            _require_alike(path, config, expected)
    except FileNotFoundError as error:
        raise ValueError(f"its {Path(str(error.filename)).name} is missing") from None
    except EvaluationError as error:
        raise ValueError(str(error)) from None
    return described


def _require_alike(path: Path, config: Mapping[str, Any], expected: Checkpoint) -> None:
    for key in KEYS:
        if config.get(key) != expected.config.get(key):
            raise ValueError(f"its config.json has {key}: {config.get(key)!r}, and not {expected.config.get(key)!r}")
    for name, file in expected.files.items():
        if not filecmp.cmp(path / name, file, shallow=False):
            raise ValueError(f"its {name} is not the base model's")
