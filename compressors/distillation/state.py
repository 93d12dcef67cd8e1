"""Save and load the state of a distillation in a directory, so that a killed one resumes: JSON and safetensors.

`state.json` is what counts: it names the files that belong to it, and is replaced last. Files that it doesn't name are
leftovers and are removed. Knows no model and no text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compressors import cached
from compressors.errors import CheckpointError, MachineError
from compressors.files import written_whole
from compressors.model import safetensors_file
from compressors.model.checkpoint import LazyTensor
from compressors.typed_json import typed

STATE = "state.json"
VERSION = 1  # increase it when earlier directories can't be resumed


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation is one measurement on the held-out windows.

    Attributes:
        tokens: The number of tokens trained on so far.
        held_out_kl: KL(teacher ‖ student) in nats per token.
        loss: The mean loss since the last evaluation, in nats per token.
    """

    tokens: int
    held_out_kl: float
    loss: float | None = None


@dataclasses.dataclass(frozen=True)
class Standing:
    """Standing is the progress of a distillation.

    Attributes:
        micro_batch: The windows that run at once, as chosen at the start.
        gradient_checkpointing: Whether activations are computed twice, as chosen at the start.
        compiled: Whether the layers were compiled in the last call.
        step: The number of batches taken.
        updates: The number of batches that changed the weights.
        bad: The number of last batches in a row that did not.
        loss: The moving mean of the batches' losses.
        recent: The sum and the number of the losses since the last evaluation.
        seconds: The seconds of everything.
        training_seconds: The seconds of the batches alone.
        evaluations: The evaluations so far.
        ended: Why the training ended, or None.
        weights: The name of the file of weights and optimizer state in the directory, or None.
        best: The name of the file of the best student, or None.
    """

    micro_batch: int
    gradient_checkpointing: bool
    compiled: bool = False
    step: int = 0
    updates: int = 0
    bad: int = 0
    loss: float | None = None
    recent: tuple[float, int] = (0.0, 0)
    seconds: float = 0.0
    training_seconds: float = 0.0
    evaluations: tuple[Evaluation, ...] = ()
    ended: str | None = None
    weights: str | None = None
    best: str | None = None


def load(work: Path, definition: Mapping[str, Any]) -> Standing | None:
    """Return what `work` holds of the distillation with this definition; None: nothing yet.

    A damaged state is removed: the distillation starts again.

    Raises:
        CheckpointError: When it holds another distillation.
        MachineError: When a damaged state can't be removed.
    """
    saved = cached.known(work / STATE, _read_whole)
    if saved is None:
        return None
    known, standing = saved
    if known != dict(definition):
        changed = sorted(key for key in {*known, *definition} if key not in known or known[key] != definition.get(key))
        changes = "; ".join(f"{key} was {known.get(key)!r} and is {definition.get(key)!r}" for key in changed[:3])
        raise CheckpointError(
            f"distill {work}: holds another distillation ({changes}); name another directory, or delete it"
        )
    return standing


def read(work: Path) -> tuple[dict[str, Any], Standing] | None:
    """Return (the definition, the standing) of whatever distillation `work` holds, or None.

    Raises:
        CheckpointError: When it can't be read.
    """
    try:
        return _read(work / STATE)[:2]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except cached.DAMAGE as error:
        raise unreadable(work, STATE, error) from None


def _read(path: Path) -> tuple[dict[str, Any], Standing, dict[str, str]]:
    """Return (the definition, the standing, the sha256 of its files by name, where it has them)."""
    values = cached.read_json(path, finite=False)  # the KL of a broken student is NaN
    if values["format"] != VERSION:
        raise ValueError(f"format {values['format']}, but only {VERSION} is known")
    standing = typed(Standing, values["standing"], "standing")
    for name in (standing.weights, standing.best):
        if name is not None and Path(name).name != name:
            raise ValueError(f"{name!r} is not a file name")
    return dict(values["definition"]), standing, typed(dict[str, str], values.get("files", {}), "files")


def _read_whole(path: Path) -> tuple[dict[str, Any], Standing]:
    """Return (the definition, the standing), after a look at the files that it names."""
    definition, standing, digests = _read(path)
    for name in (standing.weights, standing.best):
        if name is None:
            continue
        if not (path.parent / name).exists():
            raise ValueError(f"{name} is missing")
        safetensors_file.shapes(path.parent / name)
        if name in digests and cached.sha256_of(path.parent / name) != digests[name]:
            raise ValueError(f"{name} is not what was written")
    return definition, standing


def tensors(work: Path, name: str) -> dict[str, LazyTensor]:
    """Return the tensors of a file that a standing names; each is read when it is used.

    Raises:
        CheckpointError: When the file is missing or damaged.
    """
    try:
        shapes = safetensors_file.shapes(work / name)
    except CheckpointError as error:
        raise unreadable(work, name, error) from None
    return {
        key: LazyTensor(shape, dtype, safetensors_file.loader(work / name, key))
        for key, (shape, dtype) in shapes.items()
    }


def prepare(work: Path) -> None:
    """Create the directory before anything is computed for it.

    Raises:
        CheckpointError: When it can't be created.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"distill {work}: can't be made ({error.strerror or error}); name another directory"
        ) from None


def save(
    work: Path,
    definition: Mapping[str, Any],
    standing: Standing,
    weights: Mapping[str, torch.Tensor] | None,
    best: Mapping[str, torch.Tensor] | None,
    tick: Callable[[], None],
) -> Standing:
    """Write a state, and return it with the names of its files; the old state stays whole until the new one is.

    Args:
        work: The directory.
        definition: The definition of the distillation.
        standing: The progress to save.
        weights: The weights and optimizer state by name; None: not needed any more.
        best: The best student's tensors; None: unchanged.
        tick: A function that is called before each tensor.

    Raises:
        MachineError: When it can't be written.
    """
    try:
        named: dict[str, str | None] = {"weights": None, "best": standing.best}
        digests = _digests(work)
        for kind, values in (("weights", weights), ("best", best)):
            if values is not None:
                name = f"{kind}-{standing.step:08d}.safetensors"
                digests[name] = _write(work / name, values, tick)
                named[kind] = name
        standing = dataclasses.replace(standing, weights=named["weights"], best=named["best"])
        files = {name: digest for name, digest in digests.items() if name in named.values()}
        content = {"definition": dict(definition), "standing": dataclasses.asdict(standing), "files": files}
        cached.keep_json(work / STATE, {"format": VERSION, **content}, finite=False)
        for pattern in ("weights-*.safetensors", "best-*.safetensors", ".*.safetensors*", f".{STATE}*"):
            for file in work.glob(pattern):
                if file.name not in named.values():
                    file.unlink()
    except OSError as error:
        raise MachineError(
            f"distill {work}: its state can't be written ({error.strerror or error}); the last saved one is unchanged"
        ) from None
    return standing


def _digests(work: Path) -> dict[str, str]:
    """Return the sha256 of the files of the state that is there, by name."""
    try:
        return _read(work / STATE)[2]
    except cached.DAMAGE:
        return {}


def _write(path: Path, values: Mapping[str, torch.Tensor], tick: Callable[[], None]) -> str:
    """Write tensors to `path`, and return the file's sha256."""

    def loader(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            tick()
            return tensor

        return load

    lazy = {name: LazyTensor(tuple(value.shape), value.dtype, loader(value)) for name, value in values.items()}
    with written_whole(path) as scratch:
        return safetensors_file.write(scratch, lazy, finite=False)  # a training that broke is told as such


def unreadable(work: Path, name: str, error: BaseException) -> CheckpointError:
    """Return the error for a file of `work` that can't be read."""
    return CheckpointError(
        f"distill {work}: {name} can't be read ({' '.join(str(error).split())}); delete the directory, "
        "and it starts again"
    )
