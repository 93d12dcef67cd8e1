"""Small JSON files, written beside their place and renamed into it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Its directory is made if it isn't there. Raises ValueError for NaN and infinity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as out:
        json.dump(values, out, indent=1, allow_nan=False)
        out.write("\n")
    Path(out.name).chmod(0o644)
    Path(out.name).replace(path)
