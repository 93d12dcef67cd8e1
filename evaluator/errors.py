"""What can go wrong while a model is evaluated. A class's name is the failure's kind, its text one line.

EvaluationError
├── BackendUnavailable   the engine can't run on this machine, or there is no such engine
├── EngineCrashed        the engine's process ended or raised; its last lines are quoted
│   ├── EngineOutOfMemory
│   └── EngineTimeout    a start or a call took longer than allowed; the process was killed
├── NotFinite            a NaN or an infinity where a number has to be: the model is broken
└── TextError            a text that can't be read, or is too short
"""

from __future__ import annotations


class EvaluationError(RuntimeError):
    """Root of what this package raises."""


class BackendUnavailable(EvaluationError):
    pass


class EngineCrashed(EvaluationError):
    pass


class EngineOutOfMemory(EngineCrashed):
    pass


class EngineTimeout(EngineCrashed):
    pass


class NotFinite(EvaluationError):
    pass


class TextError(EvaluationError):
    pass
