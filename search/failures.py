"""Lists the errors that fail one model among several: they are reported in one line, and the others continue."""

from __future__ import annotations

import torch

from compressors.errors import CompressionError
from evaluator.errors import EngineOutOfMemory, EvaluationError
from search import secrets
from search.errors import SearchError

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
FAILURES = (SearchError, CompressionError, EvaluationError, *OUT_OF_MEMORY)


def why(error: Exception) -> dict[str, str]:
    """Return {"failure": the kind of error, "reason": its message in one line}."""
    if isinstance(error, OUT_OF_MEMORY):
        first = (str(error).splitlines() or [""])[0]
        return {"failure": EngineOutOfMemory.__name__, "reason": first or "the machine's memory is exhausted"}
    return {"failure": type(error).__name__, "reason": secrets.masked(" ".join(str(error).split()))}
