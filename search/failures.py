"""Lists the errors that fail one model among several, and says which of them are the machine's fault.

The former are reported in one line, and the other models continue. A plan is not to blame for the latter.
"""

from __future__ import annotations

import enum

import torch

from compressors.errors import CompressionError, MachineError
from evaluator.errors import BackendUnavailable, DeviceLost, EngineCrashed, EngineOutOfMemory, EvaluationError
from search import secrets
from search.errors import SearchError

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
FAILURES = (SearchError, CompressionError, EvaluationError, *OUT_OF_MEMORY)
DEVICE_ERROR = getattr(torch, "AcceleratorError", DeviceLost)  # what torch raises for CUDA errors since 2.8
MEMORY = "memory:"  # the beginning of `search.setup.machine.require_memory`'s messages


class Fault(enum.Enum):
    """Fault says what a failure tells of the plan that was tried."""

    PLAN = "plan"  # it fails again
    PERHAPS_MACHINE = "perhaps the machine"  # memory and the GPU: the plan may need too much, or other processes do
    MACHINE = "machine"  # a full disk, an I/O error, an engine's library that is gone


def fault_of(error: BaseException) -> Fault:
    """Return whether a failure is the plan's or the machine's.

    An engine that was killed twice in a row counts as the plan's: `search.stages.engines.once_more`.
    """
    if isinstance(error, EngineCrashed) and error.killed:
        return Fault.PLAN
    if isinstance(error, MachineError) and not str(error).startswith(MEMORY):
        return Fault.MACHINE
    if isinstance(error, OSError | BackendUnavailable):
        return Fault.MACHINE
    if isinstance(error, (MachineError, EngineOutOfMemory, DeviceLost, DEVICE_ERROR, *OUT_OF_MEMORY)):
        return Fault.PERHAPS_MACHINE
    return Fault.PLAN


def why(error: Exception) -> dict[str, str]:
    """Return {"failure": the kind of error, "reason": its message in one line}."""
    if isinstance(error, OUT_OF_MEMORY):
        first = (str(error).splitlines() or [""])[0]
        return {"failure": EngineOutOfMemory.__name__, "reason": first or "the machine's memory is exhausted"}
    return {"failure": type(error).__name__, "reason": secrets.masked(" ".join(str(error).split()))}
