"""The texts of a study: read once, cut into windows, and kept apart from each other."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from compressors.errors import CheckpointError
from compressors.files import write_json as write_json
from evaluator import embedded_texts, texts
from search.config.study_file import StudyFile
from search.errors import UsageError
from search.files import CACHE, read_json

Shard = list[list[int]]  # windows of token ids
Documents = Sequence[texts.Document]
Domains = Mapping[str, Documents]


@dataclasses.dataclass(frozen=True, eq=False)
class MomentsText:
    """What second moments are of: `count` windows of `length` tokens of each domain of the calibration text.

    Cut when they are first asked for, and once for a setting and whatever is made of it by `dataclasses.replace`.
    """

    domains: Domains
    tokenizer: Any
    length: int
    count: int

    @functools.cached_property
    def windows(self) -> dict[str, list[list[int]]]:
        """Token ids, by domain. Raises TextError for a domain that is too short."""
        return {
            name: texts.windows(self.tokenizer, documents, self.length, self.count)
            for name, documents in self.domains.items()
        }

    @functools.cached_property
    def digest(self) -> str:
        return " ".join(texts.text_digest(windows) for windows in self.windows.values())


@dataclasses.dataclass(frozen=True)
class StudyTexts:
    """What a study's texts were cut into.

    Attributes:
        shards: The search text, windows of token ids by shard.
        calibration_windows: Windows of token ids of the calibration text, all domains mixed.
        moments: The text that second moments are collected on.
        digest: The digest of the search text's windows.
    """

    shards: tuple[Shard, ...]
    calibration_windows: tuple[list[int], ...]
    moments: MomentsText
    digest: str


def tokenizer_of(path: Path) -> Any:
    """Of a model's directory. Raises CheckpointError."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever its readers raise: it is a file from outside
        first = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise CheckpointError(f"model {path}: its tokenizer can't be read ({first}); copy its files again") from None


def read_texts(file: StudyFile, tokenizer: Any) -> tuple[Domains, tuple[Shard, ...], tuple[list[int], ...]]:
    """(the calibration text, the search text's shards, the calibration windows)."""
    domains = _domains(file)
    for_search = _search_documents(file)
    _require_apart(file, {"calibration": _all(domains), "search": for_search})
    windows = texts.mixed_windows(tokenizer, domains, file.text.window, file.text.calibration_windows)
    return domains, _shards(file, tokenizer, for_search), tuple(windows)


def calibration_documents(file: StudyFile) -> Documents:
    """All of it, every domain. Raises UsageError where it shares text with the search text."""
    documents = _all(_domains(file))
    _require_apart(file, {"calibration": documents, "search": _search_documents(file)})
    return documents


def _all(domains: Domains) -> Documents:
    return [document for documents in domains.values() for document in documents]


def _domains(file: StudyFile) -> Domains:
    """Of the calibration text: each of its files is one, and the embedded text has several."""
    named = file.text.calibration
    if isinstance(named, str):
        return _embedded_domains()
    return {f"{place}-{Path(name).stem}": _read([name]) for place, name in enumerate(named)}


def _shards(file: StudyFile, tokenizer: Any, documents: Documents) -> tuple[Shard, ...]:
    each = file.text.windows_per_shard
    flat = texts.windows(tokenizer, documents, file.text.window, file.text.shards * each)
    return tuple(flat[start : start + each] for start in range(0, len(flat), each))


def _search_documents(file: StudyFile) -> Documents:
    return _embedded_search() if isinstance(file.text.search, str) else _read(file.text.search)


def _read(names: Sequence[str]) -> Documents:
    return [document for name in names for document in _read_once(name, _version(name))]


@functools.cache
def _read_once(name: str, version: tuple[str, ...]) -> tuple[texts.Document, ...]:
    """Again only where the file has changed. A dataset is streamed once."""
    return tuple(texts.read_documents([name]))


def _version(name: str) -> tuple[str, ...]:
    where = Path(name).absolute()
    try:
        there = where.stat()
    except OSError:  # a dataset's name, or else reading it says what is wrong
        return (str(where),)
    return str(where), str(there.st_mtime_ns), str(there.st_size)


def _require_apart(file: StudyFile, parts: Domains) -> None:
    """A plan must be judged on text that it was not fitted to. Raises UsageError."""
    (first, one), (second, other) = parts.items()
    if getattr(file.text, first) == getattr(file.text, second) == "embedded":
        return  # apart as they are made
    shared = texts.overlap(one, other)
    if shared:
        raise UsageError(
            f"text: text.{first} and text.{second} share text: {shared[0]}; a plan must be judged on text that it was "
            "not fitted to: take it out of one"
        )


@functools.cache
def _embedded_domains() -> dict[str, list[texts.Document]]:
    """Read out of Python's sources once: that takes seconds, and every command asks for them."""
    sources = [Path(embedded_texts.__file__).read_bytes(), Path(texts.__file__).read_bytes()]
    made_by = hashlib.sha256(b"".join(sources) + sys.version.encode()).hexdigest()[:16]
    path = CACHE / "texts" / f"domains-{made_by}.json"
    there = read_json(path)
    if there is not None:
        return {name: [texts.Document(*pair) for pair in pairs] for name, pairs in there.items()}
    found = embedded_texts.domains()
    with contextlib.suppress(OSError):  # no place to keep them is no reason to stop
        write_json(path, {name: [[one.name, one.text] for one in documents] for name, documents in found.items()})
    return found


@functools.cache
def _embedded_search() -> Documents:
    return texts.split(embedded_texts.documents())[1]


@functools.cache
def _embedded_report() -> Documents:
    return embedded_texts.report_documents()


def report_shards(file: StudyFile, tokenizer: Any) -> tuple[Shard, ...]:
    """Cut the report text, which neither calibration nor search saw, as the search text is cut; () where there is none.

    Raises:
        UsageError: It shares text with one of them.
        TextError: It can't be read.
    """
    if file.text.report is None:
        return ()
    documents = _embedded_report() if isinstance(file.text.report, str) else _read(file.text.report)
    _require_apart(file, {"calibration": calibration_documents(file), "report": documents})
    _require_apart(file, {"search": _search_documents(file), "report": documents})
    return _shards(file, tokenizer, documents)
