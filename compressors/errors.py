"""What can be wrong with a checkpoint or a plan; each text is one line.

CompressionError
├── CheckpointError    a directory that can't be read or written
└── InfeasiblePlan     a plan that can't be built or served; the text is the reason
"""

from __future__ import annotations


class CompressionError(ValueError):
    pass


class CheckpointError(CompressionError):
    pass


class InfeasiblePlan(CompressionError):
    pass
