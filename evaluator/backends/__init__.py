"""Inference engines, one file each. A file's name is the engine's name in a study file.

A new engine is one file here and one test. The file offers these names and imports nothing heavy at module level:

    FACTS: Facts                    what other parts ask about the engine without starting it; see `Facts`
    ENVIRONMENT: dict[str, str]     variables that must be set before the engine's library is imported
    preload() -> None               imports that library and opens no device; the warm process calls it, then forks
    unavailable() -> str | None     the reason why the engine cannot run on this machine, in one line
    Engine                          a class that satisfies the protocol `Engine`

`Backend` is this list as a protocol. `evaluator.process.EngineProcess` runs every engine in a process of its own.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from evaluator.errors import BackendUnavailable
from evaluator.generation import Answer, Limits

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel for quantized linear layers, and the sizes it wants.

    Attributes:
        name: The kernel's name, for messages.
        rows: The number that must divide a weight's output features.
        columns: The number that must divide a weight's input features.
    """

    name: str
    rows: int
    columns: int


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The sizes that an engine's kernels want on one kind of device.

    Attributes:
        engine: The engine's name, for messages.
        head_dim: The number that must divide head_dim, for the attention kernels.
        schemes: The kernel of each compressed-tensors scheme; a scheme that is missing takes every size.
    """

    engine: str
    head_dim: int
    schemes: Mapping[str, Kernel]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A scheme or dtype that an engine cannot run on some GPUs.

    Attributes:
        scheme: The compressed-tensors scheme, or the dtype.
        since: The lowest CUDA compute capability that is refused, as (major, minor); None: the lowest there is.
        reason: The reason in one line, with what to choose instead.
        before: The lowest CUDA compute capability above those that are refused; None: there is none.
    """

    scheme: str
    since: tuple[int, int] | None
    reason: str
    before: tuple[int, int] | None = None

    def holds(self, capability: tuple[int, int]) -> bool:
        """Return whether a GPU of this compute capability is refused."""
        above = self.since is None or capability >= self.since
        return above and (self.before is None or capability < self.before)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known about an engine without starting it.

    Attributes:
        packages: The installed distributions whose versions decide how fast and how exactly a checkpoint runs.
        kernels: What the kernels want, by device (cpu, cuda, mps). A device that is missing takes every size.
        batched_tokens: The most prompt tokens that one step processes; None where there is no limit.
        casts: The dtype that a checkpoint is served in, by its stored dtype, where the two differ.
        refusals: What the engine cannot start.
        random_weights: Whether it can run a config.json alone, with random weights, for timing.
        imports_slowly: Whether its library takes so long to import that it is worth to begin before it is wanted.
        arguments: Returns the names of its server's arguments that people may set, as far as the engine is installed:
            an empty set where they are not known. None: it takes none.
    """

    packages: tuple[str, ...]
    kernels: Mapping[str, Kernels] = dataclasses.field(default_factory=dict)
    batched_tokens: int | None = None
    casts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    random_weights: bool = False
    imports_slowly: bool = False
    arguments: Callable[[], frozenset[str]] | None = None


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How an engine is run.

    Attributes:
        device: auto, cpu, cuda or mps.
        max_model_len: The most tokens of one sequence.
        batch_sizes: The batch sizes that will be timed.
        gpu_memory_utilization: The share of the GPU's memory that this engine may use.
        compile: Whether vLLM uses torch.compile.
        start_timeout_s: Seconds that a start may take.
        call_timeout_s: Seconds that a call may take.
        threads: The number of CPU threads; None means one for each physical core that this process may use.
        random_weights: Whether the weights are random, so that config.json alone is read; see `Facts`.
        arguments: The arguments of the engine's server by their own names, which replace those that this program sets;
            None leaves one to the engine's own default.
        max_num_seqs: The most sequences that are generated at once; None: as many as the batch sizes need.
        kv_tokens: The tokens whose keys and values have to fit at once where max_num_seqs is given; None: those of
            max_num_seqs sequences of max_model_len.
        seed: The random seed of what is drawn for answers that have no seed of their own.
    """

    device: str = "auto"
    max_model_len: int = 1024
    batch_sizes: tuple[int, ...] = (1,)
    gpu_memory_utilization: float = 0.3
    compile: bool = False
    start_timeout_s: float = 300.0
    call_timeout_s: float = 300.0
    threads: int | None = None
    random_weights: bool = False
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_num_seqs: int | None = None
    kv_tokens: int | None = None
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineSettings:
        """Return the settings that `to_dict` wrote."""
        return cls(**{**values, "batch_sizes": tuple(values["batch_sizes"])})


class Engine(Protocol):
    """A checkpoint directory that is loaded and ready.

    Attributes:
        survives_errors: Whether it can be called again after a call raised. If not, its process ends then.
    """

    survives_errors: bool

    def __init__(self, path: str, settings: EngineSettings) -> None: ...

    def nll(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the negative log-likelihood of each token except the first, in nats.

        A window of T token ids gives T − 1 numbers.
        """

    def decode_steps(self, batch_size: int, prompt_tokens: int, steps: int, seed: int) -> list[float]:
        """Return the seconds of each of `steps` decode steps of `batch_size` sequences.

        The prefill, of `prompt_tokens` random ids a sequence, is not timed.
        """

    def generate(self, prompts: Sequence[Sequence[int]], limits: Limits | Sequence[Limits]) -> list[Answer]:
        """Return the answer to each prompt of token ids; all are given at once.

        Args:
            prompts: The token ids of each prompt.
            limits: The limits of all answers, or of each.

        Raises:
            RequestRefused: A prompt is empty or, with its answer, longer than max_model_len, or limits make no sense.
        """

    def logits_sha256(self, tokens: Sequence[int]) -> str:
        """Return the sha256 of the float32 bytes that the engine computes on one window.

        Equal weights give equal digests.
        """

    def facts(self) -> dict[str, str]:
        """Return backend, engine_version, device and dtype, and more where known, such as quantization_kernel."""


class ProfiledEngine(Engine, Protocol):
    """An engine that also knows what its GPU does; both methods are optional, and None means that it can't be known."""

    def busy_ms(self, batch_size: int, prompt_tokens: int, steps: int, seed: int) -> float | None:
        """Return the milliseconds of a decode step in which the GPU is busy, the mean of `steps` steps.

        Profiling may slow down the engine: it is not timed afterwards.
        """

    def bytes_per_s(self) -> float | None:
        """Return how many bytes a second the GPU's memory moves."""


class Backend(Protocol):
    """What a file of this folder offers; see the package's docstring."""

    FACTS: Facts
    ENVIRONMENT: dict[str, str]
    Engine: type[Engine]

    def preload(self) -> None:
        """Import the engine's library without opening a device."""

    def unavailable(self) -> str | None:
        """Return why the engine cannot run on this machine, in one line, or None."""


def names() -> list[str]:
    """Return the names of all engines, which are the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


@functools.cache  # the sampler asks for thousands of plans
def module_of(name: str) -> Backend:
    """Import and return an engine's file; its library is not imported.

    Raises:
        BackendUnavailable: No engine has this name.
    """
    if name not in names():
        raise BackendUnavailable(f"backend: {name!r} is not one of {', '.join(names())}")
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def unavailable(name: str) -> str | None:
    """Return why an engine cannot run on this machine, or None. Imports no vLLM and opens no CUDA context."""
    return module_of(name).unavailable()


def choose(name: str = "auto") -> str:
    """Return the engine to use.

    "auto" is vLLM where it is installed and torch sees a CUDA GPU, else transformers.

    Raises:
        BackendUnavailable: The named engine cannot run on this machine, or does not exist.
    """
    if name == "auto":
        return "vllm" if unavailable("vllm") is None and cuda() else "transformers"
    reason = unavailable(name)
    if reason:
        raise BackendUnavailable(f"backend {name}: {reason}")
    return name


def kernels(name: str, device: str) -> Kernels | None:
    """Return the sizes that an engine's kernels want on a device (cpu, cuda, mps); None where every size runs."""
    return module_of(name).FACTS.kernels.get(device)


def packages(name: str) -> tuple[str, ...]:
    """Return the distributions whose versions decide how an engine runs."""
    return module_of(name).FACTS.packages


def batched_tokens(name: str) -> int | None:
    """Return the most prompt tokens that one step of an engine processes, or None where there is no limit."""
    return module_of(name).FACTS.batched_tokens


def served_bytes(name: str, stored: int, dtype: str) -> int:
    """Return the bytes that an engine keeps in memory of a checkpoint's weights.

    Args:
        name: The engine's name.
        stored: The bytes of the weights in the checkpoint.
        dtype: The checkpoint's dtype, or its scheme.
    """
    served = module_of(name).FACTS.casts.get(dtype, dtype)
    return stored if served == dtype else stored * DTYPE_BYTES[served] // DTYPE_BYTES[dtype]


def kv_bytes(config: Mapping[str, Any]) -> int:
    """Return the bytes of the keys and values of one token, in all layers.

    Args:
        config: The values of config.json.
    """
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    width = int(config.get("num_key_value_heads") or heads) * head_dim
    size = 4 if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 2
    return int(config["num_hidden_layers"]) * width * 2 * size


def cannot_start(name: str, scheme: str, capability: tuple[int, int] | None, gpu: str = "this GPU") -> str | None:
    """Return why an engine cannot start a checkpoint of this scheme, in one line, or None.

    Args:
        name: The engine's name.
        scheme: The checkpoint's scheme, or its dtype.
        capability: The GPU's compute capability as (major, minor); None without a CUDA GPU.
        gpu: The GPU, for the message.
    """
    if capability is None:
        return None
    for refusal in module_of(name).FACTS.refusals:
        if refusal.scheme == scheme and refusal.holds(capability):
            return f"{scheme}: {refusal.reason} ({gpu} has compute capability {capability[0]}.{capability[1]})"
    return None


def refused_arguments(name: str, arguments: Mapping[str, Any]) -> str | None:
    """Return why an engine can't take arguments of its server, in one line, or None.

    Args:
        name: The engine's name.
        arguments: The arguments by their own names.
    """
    if not arguments:
        return None
    ask = module_of(name).FACTS.arguments
    if ask is None:
        return f"the engine {name} takes no arguments of a server; leave them out, or take the engine vllm"
    known = ask()
    unknown = [argument for argument in arguments if known and argument not in known]
    if not unknown:
        return None
    near = difflib.get_close_matches(unknown[0], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{', '.join(unknown)}: {name} has no such argument, or this program sets it{hint}"


def cuda() -> bool:
    """Return whether torch sees a CUDA GPU."""
    import torch

    return torch.cuda.is_available()


def installed(package: str) -> bool:
    """Return whether a package can be found, without importing it."""
    return importlib.util.find_spec(package) is not None
