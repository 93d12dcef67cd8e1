"""Find the files of a model's directory, and refuse symbolic links that lead out of it.

A link could carry any file of this machine into a checkpoint or a zip. The one exception is the cache of the Hugging
Face hub, whose snapshots/REVISION/NAME are links to blobs/DIGEST next to `snapshots`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from compressors.errors import CheckpointError
from readers import json_reader, safetensors_files
from readers.errors import ReadError
from readers.regular import in_words, kind_of

WEIGHTS, INDEX = safetensors_files.WEIGHTS, safetensors_files.INDEX
MOST_CARRIED = 1_000_000_000  # bytes of a file that is copied along
CARRIED = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "LICENSE*",
)
BLOB = re.compile(r"[0-9a-f]{8,64}")
SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")  # of what libraries read as a file
MOST_ENTRIES = 100_000  # in the directory and all below it


def files_of(directory: Path, *, hub_cache: bool = True) -> dict[str, Path]:
    """Return the regular files directly in a model's directory by name, each with its place behind any links.

    The directory may be a link itself. All that is below it is looked at, so that no library can be led out of it.

    Args:
        directory: A model's directory.
        hub_cache: Whether links of the hub's cache to its blobs are allowed.

    Raises:
        CheckpointError: When a link leads out of the directory or nowhere, or an entry is neither a file nor a
            directory.
    """
    top = directory.resolve()
    files: dict[str, Path] = {}
    try:
        for entry in _entries(directory, top):
            path = Path(entry.path)
            place = _resolved(path, directory, top, hub_cache) if entry.is_symlink() else path
            if path.parent != top and place == path:
                continue  # nothing reads it under that name
            kind = kind_of(place.stat(follow_symlinks=False).st_mode)
            if kind == "a directory" and path.parent == top and path.suffix in SUFFIXES:
                raise CheckpointError(f"model {directory}: {path.name} is a directory; put the file in its place")
            if kind not in (None, "a directory"):
                raise CheckpointError(
                    f"model {directory}: {path.relative_to(top)} is {kind}; a model's directory holds regular files "
                    "alone: delete it"
                )
            if kind is None and path.parent == top:
                files[path.name] = place
    except OSError as error:
        raise CheckpointError(
            f"model {directory}: {error.filename}: {error.strerror or error}; make it readable"
        ) from None
    return dict(sorted(files.items()))


def matching(files: dict[str, Path], *patterns: str) -> dict[str, Path]:
    """Return the files whose names match one of the patterns, pattern after pattern."""
    return {
        name: place
        for pattern in patterns
        for name, place in files.items()
        if fnmatchcase(name, pattern) and not name.startswith(".")
    }


def carried(path: Path, inside: dict[str, Path]) -> dict[str, Path]:
    """Return the files to copy along by name, each with its place behind any link."""
    files = matching(inside, *CARRIED)
    for name, place in files.items():
        size = place.stat().st_size
        if size > MOST_CARRIED:
            raise CheckpointError(
                f"model {path}: {name} holds {in_words(size)}, and at most {in_words(MOST_CARRIED)} of "
                "a file are copied along; put the right file in its place"
            )
    return files


def behind(path: Path) -> Path:
    """Return the place of one file of a model's directory behind any links; the file need not exist.

    Raises:
        CheckpointError: When it is a link that leads out of the directory or nowhere.
    """
    if not path.is_symlink():
        return path
    return _resolved(path, path.parent, path.parent.resolve(), True)


def require_json(path: Path, rule: str) -> dict[str, Any]:
    """Return the object in the JSON file `path` of a model's directory.

    Args:
        path: The file, in UTF-8.
        rule: What to do when the file is missing; it ends the error message.

    Raises:
        CheckpointError: When the file is missing, can't be read, or holds no object, and for a link that leads out of
            the directory.
    """
    try:
        # transformers reads these files too: it refuses a byte order mark, and accepts NaN
        values = json_reader.read(behind(path), mark=False, finite=False, follow=False)
    except FileNotFoundError:
        raise CheckpointError(f"model {path.parent}: has no {path.name}; {rule}") from None
    except (OSError, ReadError) as error:
        raise CheckpointError(
            f"model {path.parent}: {path.name} can't be read ({' '.join(str(error).split())}); copy it again"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"model {path.parent}: {path.name} holds no JSON object; copy or download it again")
    return values


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a model's directory: model.safetensors, or the shards that its index names.

    Raises:
        CheckpointError: When there are none, a shard is missing, or only pickled weights are there.
    """
    try:
        return safetensors_files.find(path, lambda index: require_json(index, ""))
    except ReadError as error:
        raise CheckpointError(f"model {path}: {error}") from None


def _entries(directory: Path, top: Path) -> Iterator[os.DirEntry[str]]:
    waiting, seen = [str(top)], 0
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                seen += 1
                if seen > MOST_ENTRIES:
                    raise CheckpointError(
                        f"model {directory}: holds more than {MOST_ENTRIES:,} files; name a directory that holds the "
                        "model alone"
                    )
                yield entry
                if entry.is_dir(follow_symlinks=False) and os.access(entry.path, os.R_OK | os.X_OK):
                    waiting.append(entry.path)


def _resolved(link: Path, directory: Path, top: Path, hub_cache: bool) -> Path:
    """Return where `link` leads; `directory` is the name for messages of the resolved directory `top`."""
    named = f"model {directory}: {link.relative_to(top) if link.is_relative_to(top) else link.name}"
    try:
        place = link.resolve(strict=True)
    except (OSError, RuntimeError):  # missing, or in a circle
        raise CheckpointError(
            f"{named} is a symbolic link that leads nowhere ({_target(link)}); put the file in its place, or delete it"
        ) from None
    if place.is_relative_to(top) or (hub_cache and _is_blob(place, top)):
        return place
    raise CheckpointError(
        f"{named} is a symbolic link that leads out of the model's directory ({_target(link)}); put a copy of the file "
        "in its place"
    )


def _is_blob(place: Path, top: Path) -> bool:
    """Return whether `place` is a blob of the hub's cache, of which `top` or the directory above it is a snapshot."""
    for snapshot in (top, top.parent):
        if snapshot.parent.name == "snapshots":
            blobs = snapshot.parent.parent / "blobs"  # no link: a resolved path has none above it
            return place.parent == blobs and BLOB.fullmatch(place.name) is not None and place.is_file()
    return False


def _target(link: Path) -> str:
    return ascii(str(link.readlink()))[1:-1][:100]
