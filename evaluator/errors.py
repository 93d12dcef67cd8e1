"""Errors of an evaluation. A class's name is the kind of the failure, and its text is one line.

EvaluationError
├── BackendUnavailable   the engine cannot run on this machine, or does not exist
├── EngineCrashed        the engine's process ended or raised; its last lines are quoted
│   ├── EngineOutOfMemory
│   ├── DeviceLost       the GPU, its driver or the disk failed, whatever the model
│   └── EngineTimeout    a start or a call took longer than allowed, and the process was killed
├── NotFinite            a number is NaN or infinite: the model is broken
├── RequestRefused       an answer is asked for that can't be generated, such as one that is too long
└── TextError            a text cannot be read, or is too short
"""

from __future__ import annotations


class EvaluationError(RuntimeError):
    """The root of what this package raises."""


class BackendUnavailable(EvaluationError):
    """The engine cannot run on this machine, or does not exist."""


class EngineCrashed(EvaluationError):
    """The engine's process ended or raised.

    Attributes:
        killed: Whether a signal ended the process: one from outside, or a segmentation fault.
    """

    killed = False


class EngineOutOfMemory(EngineCrashed):
    """The engine ran out of memory, of the GPU or of the machine."""


class DeviceLost(EngineCrashed):
    """The GPU, its driver or the disk failed, whatever the model."""


class EngineTimeout(EngineCrashed):
    """A start or a call took longer than allowed, and the process was killed."""


class NotFinite(EvaluationError):
    """A number of a model is NaN or infinite: the model is broken."""


class RequestRefused(EvaluationError):
    """An answer is asked for that can't be generated: a prompt is empty or too long, or its limits make no sense."""


class TextError(EvaluationError):
    """A text or a task cannot be read, or is too short."""


def install(extra: str | None = None) -> str:
    """Return how to install optuna-search, with an extra where one is named: there is no release to install."""
    what = "." if extra is None else f"'.[{extra}]'"
    return f"run `pip install {what}` in the checkout of optuna-search"
