"""Reads the texts of a study once, cuts them into windows, and checks that they share nothing."""

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

from compressors import cached
from compressors.errors import CheckpointError, MachineError
from compressors.typed_json import typed
from evaluator import embedded_texts, texts
from search.config.study_file import StudyFile
from search.errors import UsageError
from search.files import CACHE

Shard = list[list[int]]  # windows of token ids
Documents = Sequence[texts.Document]
Domains = Mapping[str, Documents]


@dataclasses.dataclass(frozen=True, eq=False)
class MomentsText:
    """MomentsText holds the text for second moments: windows from each domain of the calibration text.

    The windows are cut on first use. Settings that are copied with `dataclasses.replace` share them.

    Attributes:
        domains: The documents of the calibration text, by domain.
        tokenizer: The tokenizer of the base model.
        length: The tokens in a window.
        count: The number of windows from each domain.
    """

    domains: Domains
    tokenizer: Any
    length: int
    count: int

    @functools.cached_property
    def windows(self) -> dict[str, list[list[int]]]:
        """The windows of token ids, by domain.

        Raises:
            TextError: A domain is too short.
        """
        return {
            name: texts.windows(self.tokenizer, documents, self.length, self.count)
            for name, documents in self.domains.items()
        }

    @functools.cached_property
    def digest(self) -> str:
        """The digests of all domains' windows, separated by spaces."""
        return " ".join(texts.text_digest(windows) for windows in self.windows.values())


@dataclasses.dataclass(frozen=True)
class StudyTexts:
    """StudyTexts holds the windows that a study's texts are cut into.

    Attributes:
        shards: The windows of token ids of the search text, by shard.
        calibration_windows: The windows of token ids of the calibration text, from all domains in turn.
        moments: The text that second moments are collected on.
        digest: The digest of the search text's windows.
    """

    shards: tuple[Shard, ...]
    calibration_windows: tuple[list[int], ...]
    moments: MomentsText
    digest: str


def tokenizer_of(path: Path) -> Any:
    """Load the tokenizer of the model in `path`.

    Raises:
        CheckpointError: Its tokenizer files can't be read.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the readers of damaged files raise many unrelated types
        first = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise CheckpointError(f"model {path}: its tokenizer can't be read ({first}); copy its files again") from None


def read_texts(file: StudyFile, tokenizer: Any) -> tuple[Domains, tuple[Shard, ...], tuple[list[int], ...]]:
    """Read and cut the texts that a study searches with.

    Returns:
        The documents of the calibration text by domain, the shards of the search text, and the calibration windows.

    Raises:
        TextError: A text can't be read, or is too short.
        UsageError: The two texts share text.
    """
    domains = _domains(file)
    for_search = _search_documents(file)
    _require_apart(file, {"calibration": _all(domains), "search": for_search})
    windows = texts.mixed_windows(tokenizer, domains, file.text.window, file.text.calibration_windows)
    return domains, _shards(file, tokenizer, for_search), tuple(windows)


def calibration_documents(file: StudyFile) -> Documents:
    """Return the documents of the calibration text, from all its domains.

    Raises:
        UsageError: It shares text with the search text.
    """
    documents = _all(_domains(file))
    _require_apart(file, {"calibration": documents, "search": _search_documents(file)})
    return documents


def _all(domains: Domains) -> Documents:
    return [document for documents in domains.values() for document in documents]


def _domains(file: StudyFile) -> Domains:
    """Return the domains of the calibration text: one for each file, several for the embedded text."""
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
    """Read a text; `version` has it read again only when the file has changed. A dataset is streamed once."""
    return tuple(texts.read_documents([name]))


def _version(name: str) -> tuple[str, ...]:
    where = Path(name).absolute()
    try:
        stat = where.stat()
    except OSError:  # the name of a dataset, or a missing file, which reading it reports
        return (str(where),)
    return str(where), str(stat.st_mtime_ns), str(stat.st_size)


def _require_apart(file: StudyFile, parts: Domains) -> None:
    """Check that two texts share nothing: a plan must be judged on text that it was not fitted to.

    Raises:
        UsageError: They share text.
    """
    (first, one), (second, other) = parts.items()
    if getattr(file.text, first) == getattr(file.text, second) == "embedded":
        return  # the embedded texts share nothing by construction
    shared = texts.overlap(one, other)
    if shared:
        raise UsageError(
            f"text: text.{first} and text.{second} share text: {shared[0]}; a plan must be judged on text that it was "
            "not fitted to: take it out of one"
        )


@functools.cache
def _embedded_domains() -> dict[str, list[texts.Document]]:
    """Return the embedded domains; they are cached on disk, since reading Python's sources takes seconds."""
    sources = [Path(embedded_texts.__file__).read_bytes(), Path(texts.__file__).read_bytes()]
    made_by = hashlib.sha256(b"".join(sources) + sys.version.encode()).hexdigest()[:16]
    path = CACHE / "texts" / f"domains-{made_by}.json"
    with contextlib.suppress(MachineError):  # a cache that can't be used is no reason to stop
        return cached.kept(path, _read_domains, lambda path: cached.keep_json(path, _plain(embedded_texts.domains())))
    return embedded_texts.domains()


def _read_domains(path: Path) -> dict[str, list[texts.Document]]:
    pairs = typed(dict[str, list[tuple[str, str]]], cached.read_json(path), "domains")
    if not pairs or not all(pairs.values()):
        raise ValueError("a domain holds no document")
    return {name: [texts.Document(*pair) for pair in of_domain] for name, of_domain in pairs.items()}


def _plain(domains: Mapping[str, Sequence[texts.Document]]) -> dict[str, list[list[str]]]:
    return {name: [[one.name, one.text] for one in documents] for name, documents in domains.items()}


@functools.cache
def _embedded_search() -> Documents:
    return texts.split(embedded_texts.documents())[1]


@functools.cache
def _embedded_report() -> Documents:
    return embedded_texts.report_documents()


def report_shards(file: StudyFile, tokenizer: Any) -> tuple[Shard, ...]:
    """Cut the report text, which neither calibration nor search saw, into shards; return () where there is none.

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
