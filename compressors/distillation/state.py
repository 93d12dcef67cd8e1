"""Where a distillation stands, kept in a directory so that a killed one goes on: JSON and safetensors, nothing else.

`state.json` is what counts: it names the files that belong to it, and is written beside its place and renamed last.
What it doesn't name is left over and removed. Knows no model and no text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compressors.errors import CheckpointError
from compressors.model import safetensors_file
from compressors.model.checkpoint import LazyTensor

STATE = "state.json"
FORMAT = 1  # raised whenever a directory of before could not be gone on with


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """After `tokens`: KL(teacher ‖ student) on the held-out windows, and the mean loss since the last one, in nats."""

    tokens: int
    held_out_kl: float
    loss: float | None = None


@dataclasses.dataclass(frozen=True)
class Standing:
    """
    micro_batch, gradient_checkpointing: as they were chosen when it began. compiled: in the last call.
    step: batches taken; updates: those that changed the weights; bad: the last ones in a row that could not.
    loss: moving mean of the batches' loss. recent: sum and number of the losses since the last evaluation.
    seconds: of everything; training_seconds: of the batches alone.
    ended: why it ended, or None. weights, best: names of files in the directory, or None.
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
    """What `work` holds of the distillation that `definition` says; None: nothing yet.

    Raises CheckpointError where it is another one, or can't be read.
    """
    found = read(work)
    if found is None:
        return None
    known, standing = found
    if known != dict(definition):
        changed = sorted(key for key in {*known, *definition} if key not in known or known[key] != definition.get(key))
        said = "; ".join(f"{key} was {known.get(key)!r} and is {definition.get(key)!r}" for key in changed[:3])
        raise CheckpointError(
            f"distill {work}: holds another distillation ({said}); name another directory, or delete it"
        )
    return standing


def read(work: Path) -> tuple[dict[str, Any], Standing] | None:
    """(its definition, where it stands), whatever it is. Raises CheckpointError."""
    try:
        values = json.loads((work / STATE).read_text())
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, and {FORMAT} is known")
        entry = dict(values["standing"])
        entry["evaluations"] = tuple(Evaluation(**evaluation) for evaluation in entry["evaluations"])
        entry["recent"] = (float(entry["recent"][0]), int(entry["recent"][1]))
        standing = Standing(**entry)
        for name in (standing.weights, standing.best):
            if name is not None and Path(name).name != name:
                raise ValueError(f"{name!r} is no file's name")
        return dict(values["definition"]), standing
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise unreadable(work, STATE, error) from None


def tensors(work: Path, name: str) -> dict[str, LazyTensor]:
    """Of a file that a standing names, each read when it is used. Raises CheckpointError."""
    try:
        shapes = safetensors_file.shapes(work / name)
    except CheckpointError as error:
        raise unreadable(work, name, error) from None
    return {
        key: LazyTensor(shape, dtype, safetensors_file.loader(work / name, key))
        for key, (shape, dtype) in shapes.items()
    }


def prepare(work: Path) -> None:
    """Make the directory, before anything is spent on what it is to hold. Raises CheckpointError."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"distill {work}: can't be made ({error.strerror or error}); name another place"
        ) from None


def save(
    work: Path,
    definition: Mapping[str, Any],
    standing: Standing,
    weights: Mapping[str, torch.Tensor] | None,
    best: Mapping[str, torch.Tensor] | None,
    tick: Callable[[], None],
) -> Standing:
    """Write it, and return it with the names of its files. weights None: none are needed. best None: as it was.

    tick: called before each tensor. What was there stays whole until the new is. Raises CheckpointError.
    """
    try:
        named: dict[str, str | None] = {"weights": None, "best": standing.best}
        for kind, values in (("weights", weights), ("best", best)):
            if values is not None:
                name = f"{kind}-{standing.step:08d}.safetensors"
                _write(work / name, values, tick)
                named[kind] = name
        standing = dataclasses.replace(standing, weights=named["weights"], best=named["best"])
        content = {"format": FORMAT, "definition": dict(definition), "standing": dataclasses.asdict(standing)}
        written = work / f".{STATE}"
        written.write_text(json.dumps(content, indent=1) + "\n")
        written.replace(work / STATE)
        for pattern in ("weights-*.safetensors", "best-*.safetensors", ".*.safetensors"):
            for file in work.glob(pattern):
                if file.name not in named.values():
                    file.unlink()
    except OSError as error:
        raise CheckpointError(
            f"distill {work}: its state can't be written ({error.strerror or error}); what was there is as it was"
        ) from None
    return standing


def _write(path: Path, values: Mapping[str, torch.Tensor], tick: Callable[[], None]) -> None:
    def loader(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            tick()
            return tensor

        return load

    written = path.with_name(f".{path.name}")
    try:
        lazy = {name: LazyTensor(tuple(value.shape), value.dtype, loader(value)) for name, value in values.items()}
        safetensors_file.write(written, lazy)
        written.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            written.unlink()
        raise


def unreadable(work: Path, name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"distill {work}: {name} can't be read ({' '.join(str(error).split())}); delete the directory, "
        "and it begins anew"
    )
