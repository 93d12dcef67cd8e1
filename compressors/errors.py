"""Define what can be wrong with a checkpoint or a plan; each message is one line.

CompressionError
├── CheckpointError    a directory that can't be read or written
│   ├── NotFiniteWeights   a weight that is NaN or infinite, and so is not written
│   └── MachineError   a full disk, an I/O error, too little memory: no fault of a plan or a model
└── InfeasiblePlan     a plan that can't be built or served; the message is the reason
"""

from __future__ import annotations


class CompressionError(ValueError):
    """CompressionError is the base class of this package's errors, and stands for settings that are out of range."""


class CheckpointError(CompressionError):
    """CheckpointError says that a model, its weights or a file derived from them can't be read, used or written."""


class NotFiniteWeights(CheckpointError):
    """NotFiniteWeights says that a weight is NaN or infinite.

    Attributes:
        name: The name of the tensor.
    """

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class MachineError(CheckpointError):
    """MachineError says that the disk or the memory failed, for which no plan is to blame; it may work later."""


class InfeasiblePlan(CompressionError):
    """InfeasiblePlan says why a plan can't be built from its base model, or not be served."""


def first_line(error: BaseException, most: int = 200) -> str:
    """Return the first line of an error's text, at most `most` characters; its type's name where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]
