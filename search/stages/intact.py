"""Checks checkpoints that were built earlier against the digests in their compression.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressors import cached
from compressors.model.checkpoint import WEIGHTS, require_json
from compressors.plan import DESCRIPTION
from evaluator import measure
from evaluator.errors import EvaluationError

FILES = "files"  # the key of the digests of all files but the weights, by name


def digests(directory: Path) -> dict[str, str]:
    """Return the sha256 of each file of a checkpoint except its weights and compression.json, by name."""
    names = sorted(file.name for file in directory.iterdir() if file.name not in (WEIGHTS, DESCRIPTION))
    return {name: cached.sha256_of(directory / name) for name in names}


def read(path: Path) -> dict[str, Any]:
    """Return the compression.json of a checkpoint, after all of its files were compared with it.

    Raises:
        FileNotFoundError: When there is no such directory.
        OSError, ValueError: When it is damaged: the message says what is wrong.
    """
    if not path.is_dir():
        path.stat()
        raise ValueError("it is no directory")
    try:
        described = cached.read_json(path / DESCRIPTION)
        require_json(path / "config.json", "")
        if described["weights_sha256"] != measure.weights_sha256_of(path):
            raise ValueError("its weights are not those that were written")
        for name, digest in dict(described.get(FILES, {})).items():
            if cached.sha256_of(path / name) != digest:
                raise ValueError(f"its {name} is not what was written")
    except FileNotFoundError as error:
        raise ValueError(f"its {Path(str(error.filename)).name} is missing") from None
    except EvaluationError as error:
        raise ValueError(str(error)) from None
    return described
