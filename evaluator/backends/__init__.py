"""Inference engines, one a file; the file's name is the engine's name in a study file.

A file holds, and imports nothing heavy to say so:
    ENVIRONMENT: dict[str, str]     what has to be set before the engine's library is imported
    preload() -> None               imports it, and opens no device: the warm process runs this and then forks engines
    unavailable() -> str | None     why the engine can't run on this machine
    class Engine                    see `Engine` here
Engines are run through `evaluator.process.EngineProcess`, each in a process of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol

from evaluator.errors import BackendUnavailable


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How an engine is run.

    device: auto | cpu | cuda | mps. max_model_len: most tokens of a sequence. batch_sizes: those that will be timed.
    gpu_memory_utilization: share of the GPU's memory for this engine. compile: torch.compile inside vLLM.
    threads: None: one per physical core that this process may use.
    """

    device: str = "auto"
    max_model_len: int = 1024
    batch_sizes: tuple[int, ...] = (1,)
    gpu_memory_utilization: float = 0.3
    compile: bool = False
    start_timeout_s: float = 300.0
    call_timeout_s: float = 300.0
    threads: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineSettings:
        return cls(**{**values, "batch_sizes": tuple(values["batch_sizes"])})


class Engine(Protocol):
    """A checkpoint directory that is loaded and ready.

    survives_errors: whether it can be called again after a call raised; if not, its process ends then.
    """

    survives_errors: bool

    def __init__(self, path: str, settings: EngineSettings) -> None: ...

    def nll(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Negative log-likelihood in nats of each token but the first: T − 1 numbers per window of T ids."""

    def decode_steps(self, batch_size: int, prompt_tokens: int, steps: int, seed: int) -> list[float]:
        """Seconds of each of `steps` decode steps of `batch_size` sequences, after a prefill of random ids."""

    def logits_sha256(self, tokens: Sequence[int]) -> str:
        """Of the float32 bytes of what the engine computes on one window: equal weights, equal digest."""

    def facts(self) -> dict[str, str]:
        """backend, engine_version, device, dtype and what else is worth knowing, such as quantization_kernel."""


def names() -> list[str]:
    """The engines there are: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def module_of(name: str) -> ModuleType:
    """The engine's file, imported; nothing heavy is. Raises BackendUnavailable for an unknown name."""
    if name not in names():
        raise BackendUnavailable(f"backend: {name!r} is not one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def unavailable(name: str) -> str | None:
    """Why this engine can't run here, or None. Imports neither vLLM nor opens a CUDA context."""
    reason: str | None = module_of(name).unavailable()
    return reason


def choose(name: str = "auto") -> str:
    """The engine to use. "auto": vLLM where it is installed and there is a CUDA GPU, else transformers.

    Raises BackendUnavailable when the named one can't run here.
    """
    if name == "auto":
        return "vllm" if unavailable("vllm") is None and cuda() else "transformers"
    reason = unavailable(name)
    if reason:
        raise BackendUnavailable(f"backend {name}: {reason}")
    return name


def cuda() -> bool:
    """Whether torch sees a CUDA GPU."""
    import torch

    return torch.cuda.is_available()


def installed(package: str) -> bool:
    """Whether the package can be found; it is not imported."""
    return importlib.util.find_spec(package) is not None
