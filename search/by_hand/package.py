"""Packs a checkpoint directory that passes the submission list into submit.zip."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.model import model_directory, transformers_version
from readers.errors import ReadError
from readers.regular import open_regular
from search.by_hand.submission_rules import OWN, Rule, check
from search.errors import UsageError
from search.files import sweep
from search.processes import mark

BLOCK = 8 << 20  # bytes read at a time
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold, the same for every file


@dataclasses.dataclass(frozen=True)
class Packed:
    """Packed describes a zip file that was written.

    Attributes:
        bytes: The size of the zip file.
        sha256: The digest of the zip file.
        files: The names in the zip.
    """

    path: Path
    bytes: int
    sha256: str
    files: tuple[str, ...]


def pack(
    model: Path,
    out: Path,
    *,
    target: str | None = transformers_version.DEFAULT,
    max_model_mb: float | None = None,
    max_zip_mb: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    checked: Sequence[Rule] | None = None,
) -> Packed:
    """Write a checkpoint to a zip file, as `model/config.json`, `model/model.safetensors` and so on.

    The same files give the same bytes, whatever their times, their owners and the name of their directory: order,
    times and modes are fixed, and nothing is compressed (weights don't shrink, and versions of zlib differ). The zip
    appears whole or not at all: after an error or Ctrl-C a file that was there before is untouched.

    Args:
        model: The directory of the checkpoint.
        out: The zip file to write.
        target: The version of transformers that is to read the checkpoint; None to require no version.
        max_model_mb: The largest size of the weights; 1 MB is 1e6 bytes.
        max_zip_mb: The largest size of the zip file.
        progress: Is called with the number of bytes written and the number of all bytes.
        checked: The rules that `check` returned for `model` just now; None to check them here.

    Returns:
        The zip file that was written.

    Raises:
        UsageError: A rule fails, the zip would be too large, or it can't be written.
    """
    model, out = Path(model), Path(out)
    rules = check(model, target=target, max_model_mb=max_model_mb) if checked is None else checked
    failed = [f"{rule.name}: {rule.found}" for rule in rules if not rule.ok]
    if failed:
        raise UsageError(f"package {model}: {len(failed)} of {len(rules)} rules fail: {' · '.join(failed)}")
    _require_place(out, model)
    # a zip holds the files' bytes, never links; the hub's cache has to be copied first
    packed = model_directory.files_of(model, hub_cache=False)
    sources = {name: place for name, place in packed.items() if name not in OWN}
    total = sum(place.stat().st_size for place in sources.values())
    _require_small(out, total, max_zip_mb)
    _require_disk(out, total)
    scratch, new = out.with_name(f".{out.name}.package-{mark()}"), _missing_parents(out)
    whole = False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep(out.parent, f".{out.name}.package-")
        _write(scratch, sources, total, progress)
        size = scratch.stat().st_size
        _require_small(out, size, max_zip_mb)
        sha256 = _sha256(scratch)
        scratch.replace(out)
        whole = True
    except (OSError, ReadError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"package to {out}: {reason}; nothing was changed there") from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
            for directory in () if whole else new:
                directory.rmdir()
    return Packed(out, size, sha256, tuple(f"model/{name}" for name in sources))


def to_json(rules: Sequence[Rule], packed: Packed | None = None) -> dict[str, Any]:
    """Return the rules and the zip file, where one was written, as plain JSON values."""
    values = None if packed is None else {**dataclasses.asdict(packed), "path": str(packed.path)}
    return {"rules": [dataclasses.asdict(rule) for rule in rules], "packed": values}


def _write(path: Path, sources: Mapping[str, Path], total: int, progress: Callable[[int, int], None]) -> None:
    done = 0
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, source in sources.items():
            entry = zipfile.ZipInfo(f"model/{name}", EPOCH)
            entry.create_system = 3  # Unix on every system, since the modes below are Unix modes
            entry.external_attr = 0o100644 << 16
            entry.file_size = size = source.stat().st_size  # decides the header: beyond 4 GiB it is another one
            with open_regular(source, follow=False) as reader, archive.open(entry, "w") as writer:
                copied = 0
                while block := reader.read(BLOCK):
                    writer.write(block)
                    copied += len(block)
                    progress(done + copied, total)
            if copied != size:
                raise UsageError(f"package: {source} changed while it was read; pack it again when it is written")
            done += size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_place(out: Path, model: Path) -> None:
    if out.is_dir():
        raise UsageError(f"package to {out}: is a directory; name a file, such as submit.zip")
    if model.resolve() in out.resolve().parents:
        raise UsageError(f"package to {out}: is inside the model's directory; name a file outside {model}")


def _require_small(out: Path, size: int, most: float | None) -> None:
    if most is not None and size > most * 1e6:
        raise UsageError(
            f"package to {out}: {size / 1e6:.1f} MB exceed the limit of {most:.1f} MB (limits.max_zip_mb); nothing was "
            "written; compress more"
        )


def _require_disk(out: Path, needed: int) -> None:
    directory = next(parent for parent in out.resolve().parents if parent.exists())
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UsageError(
            f"package to {out}: needs {needed / 1e6:.1f} MB and {directory} has {free / 1e6:.1f} MB free; nothing was "
            "written; free some, or name another place"
        )


def _missing_parents(out: Path) -> list[Path]:
    """Return the directories that have to be made for `out`, the innermost first."""
    return [parent for parent in out.absolute().parents if not parent.exists()]
