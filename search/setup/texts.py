"""Reads the texts of a study once, keeps them apart, and cuts them into windows.

A text that judges must share nothing with the texts before it. What the search text shares with the calibration text is
left out of the calibration text: the search text is never changed, since the numbers of a study depend on it. What the
report text shares with either is left out of the report text, since both are in use before it is read. More than
MOST_SHARED is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from compressors import cached
from compressors.errors import CheckpointError, MachineError
from compressors.files import digest_of_json
from compressors.model import config_types, model_directory
from compressors.typed_json import typed
from evaluator import embedded_texts, shared_text, texts
from search.config.study_file import StudyFile
from search.config.text_section import EMBEDDED, SELF
from search.errors import UsageError
from search.files import CACHE
from search.say import Say, silent
from search.setup.guarded_chat import chat_template_of
from search.setup.guarded_tokenizer import GuardedTokenizer, Trial, doubt_of

Shard = list[list[int]]  # windows of token ids
Documents = Sequence[texts.Document]
Domains = Mapping[str, Documents]
Named = Sequence[str] | Mapping[str, float] | str  # the texts of a study file, as it names them

MOST_SHARED = 0.01  # the largest share of a text that is left out of it


@dataclasses.dataclass(frozen=True, eq=False)
class MomentsText:
    """MomentsText holds the text for second moments: windows from each domain of the calibration text.

    The windows are cut on first use, and only then does the base model write its part of a mix. Settings that are
    copied with `dataclasses.replace` share them.

    Attributes:
        domains: The documents of the calibration text, by domain.
        tokenizer: The tokenizer of the base model.
        length: The tokens in a window.
        count: The number of windows from each domain.
        own: Returns the domains that the base model writes, beside others; there may be none.
        weigh: Returns how much each of these domains counts; None: all count the same.
        or_fewer: Whether a shorter domain gives what it has.
        warn: Told of such domains.
    """

    domains: Domains
    tokenizer: Any
    length: int
    count: int
    own: Callable[[], Domains] = dict
    weigh: Callable[[Iterable[str]], dict[str, float] | None] = lambda domains: None
    or_fewer: bool = False
    warn: Say = silent

    @property
    def shares(self) -> dict[str, float] | None:
        """How much each domain of `windows` counts; None: all the same."""
        shares = self.weigh(self.windows)
        return shares if shares is not None and len(set(shares.values())) > 1 else None

    @functools.cached_property
    def windows(self) -> dict[str, list[list[int]]]:
        """The windows of token ids, by domain.

        Raises:
            TextError: A domain is too short.
        """
        found = {
            name: texts.windows(self.tokenizer, documents, self.length, self.count, or_fewer=self.or_fewer)
            for name, documents in {**self.domains, **self.own()}.items()
        }
        for name, windows in found.items():
            if len(windows) < self.count:
                self.warn(
                    f"text.calibration {name}: {len(windows)} windows of {self.length} tokens, where others give up to "
                    f"{self.count}; more text of this kind lets repairs hold on it"
                )
        return found

    @functools.cached_property
    def given_digest(self) -> str:
        """The digest of the given domains' documents, in 16 hexadecimal digits."""
        return digest_of_json({name: [each.text for each in documents] for name, documents in self.domains.items()}, 16)

    @functools.cached_property
    def digest(self) -> str:
        """The digests of all domains' windows, separated by spaces, and the domains' weights, where they have some."""
        named = [texts.text_digest(windows) for windows in self.windows.values()]
        return " ".join([*named, *(f"{share:g}" for share in (self.shares or {}).values())])


@dataclasses.dataclass(frozen=True, eq=False)
class DistillationText:
    """DistillationText holds the windows that `repair: distill` learns from, cut on first use.

    Each domain gives its part of the tokens. Where a given text is too short, the base model writes what is missing.

    Attributes:
        given: The documents of the given domains of the calibration text.
        own: Returns documents that the base model writes, by kind, with at least so many windows of each; there may be
            none.
        tokenizer: The tokenizer of the base model.
        length: The tokens in a window.
        tokens: The tokens in all.
        weigh: Returns how much each of these domains counts; None: all count the same.
    """

    given: Domains
    own: Callable[[int], Domains]
    tokenizer: Any
    length: int
    tokens: int
    weigh: Callable[[Iterable[str]], dict[str, float] | None] = lambda domains: None

    @functools.cached_property
    def windows(self) -> dict[str, list[list[int]]]:
        """The windows of token ids, by domain. Raises TextError where the base model is to write and can't."""
        count = -(-self.tokens // self.length)
        kinds = list(self.own(0))
        share = self._shares([*self.given, *kinds])
        found = {
            name: _spread(texts.all_windows(self.tokenizer, documents, self.length), math.ceil(count * share[name]))
            for name, documents in self.given.items()
        }
        if not kinds:
            return found
        missing = max(count - sum(map(len, found.values())), 0)
        of_own = math.fsum(share[kind] for kind in kinds)
        most = math.ceil(missing * max(share[kind] for kind in kinds) / of_own)
        for kind, documents in self.own(most).items():
            every = texts.all_windows(self.tokenizer, documents, self.length)
            found[kind] = every[: math.ceil(missing * share[kind] / of_own)]
        return found

    def _shares(self, names: Sequence[str]) -> dict[str, float]:
        weights = self.weigh(names) or dict.fromkeys(names, 1.0)
        whole = math.fsum(weights.values())
        return {name: weight / whole for name, weight in weights.items()}

    @functools.cached_property
    def digest(self) -> str:
        """The digests of all domains' windows, separated by spaces."""
        return " ".join(texts.text_digest(windows) for windows in self.windows.values())


def _spread(windows: Shard, count: int) -> Shard:
    """Return `count` windows spread evenly over all; all where there are fewer."""
    return [windows[index * len(windows) // count] for index in range(count)] if count < len(windows) else windows


@dataclasses.dataclass(frozen=True)
class StudyTexts:
    """StudyTexts holds the windows that a study's texts are cut into.

    Attributes:
        shards: The windows of token ids of the search text, by shard.
        calibration_windows: The windows of token ids of the calibration text, from all domains in turn.
        moments: The text that second moments are collected on.
        distillation: The text that `repair: distill` learns from.
        digest: The digest of the search text's windows.
        unseen: Returns the shards of text that the base model wrote and nothing is fitted to; there may be none.
    """

    shards: tuple[Shard, ...]
    calibration_windows: tuple[list[int], ...]
    moments: MomentsText
    distillation: DistillationText
    digest: str
    unseen: Callable[[], tuple[Shard, ...]] = tuple


def tokenizer_of(path: Path) -> Any:
    """Load the tokenizer of the model in `path`; what may run for long in it runs within limits.

    Raises:
        CheckpointError: Its tokenizer files can't be read, a link leads out of the directory, or it takes too long or
            too much memory for a short text.
    """
    files = model_directory.files_of(path)
    config_types.require_tokenizer_files(path, files)
    file = files.get("tokenizer.json")
    doubt = None if file is None else doubt_of(path, file)
    trial = None if file is None or doubt is None else Trial(path, file, doubt)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        template = chat_template_of(path, tokenizer)
        return tokenizer if trial is None and template is None else GuardedTokenizer(tokenizer, trial, template)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # readers of damaged files raise many types, and a panic of Rust code no Exception
        first = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise CheckpointError(f"model {path}: its tokenizer can't be read ({first}); copy its files again") from None


def read_texts(
    file: StudyFile, tokenizer: Any, own: Callable[[], Domains], warn: Say = silent
) -> tuple[Domains, tuple[Shard, ...], tuple[list[int], ...]]:
    """Read and cut the texts that a study searches with.

    Args:
        file: The study file.
        tokenizer: The tokenizer of the base model.
        own: Returns text that the base model writes, which is asked where the calibration text is nothing else.
        warn: Told what is left out of the calibration text.

    Returns:
        The documents of the calibration text by domain, the shards of the search text, and the calibration windows.

    Raises:
        TextError: A text can't be read, or is too short.
        UsageError: The two texts share too much.
    """
    domains = _calibration(file, own, warn)
    weights = calibration_weights(file, domains)
    windows = texts.mixed_windows(tokenizer, domains, file.text.window, file.text.calibration_windows, weights)
    return domains, _shards(file, tokenizer, _judging(file, "search"), file.text.search), tuple(windows)


def calibration_weights(file: StudyFile, domains: Iterable[str]) -> dict[str, float] | None:
    """Return how much each domain of the calibration text counts, by the weights of the texts; None: all the same.

    The domains of one text share its weight.
    """
    weights = file.text.calibration
    if not isinstance(weights, Mapping):
        return None
    of_domain = {domain: _text_of(file, domain) for domain in domains}
    counts = Counter(of_domain.values())
    return {domain: weights[text] / counts[text] for domain, text in of_domain.items()}


def _text_of(file: StudyFile, domain: str) -> str:
    """Return the text of the calibration text that a domain is of."""
    place, dash, _ = domain.partition("-")
    if dash:
        return file.text.calibration_names[int(place)]
    return EMBEDDED if EMBEDDED in file.text.calibration_names and domain in _embedded_domains() else SELF


def calibration_documents(of: StudyTexts) -> Documents:
    """Return the documents of the calibration text, from all its domains, without what the search text holds.

    What the base model writes is among them only where there is nothing else.
    """
    return _all(of.moments.domains)


def _all(domains: Domains) -> Documents:
    return [document for documents in domains.values() for document in documents]


def _calibration(file: StudyFile, own: Callable[[], Domains], warn: Say) -> Domains:
    """Return the domains of the calibration text without what the search text holds."""
    domains = _domains(file) or own()
    return _without(file, ("calibration", domains), ("search", _all(_judging(file, "search"))), warn)


def _without(file: StudyFile, one: tuple[str, Domains], other: tuple[str, Documents], warn: Say) -> Domains:
    """Return the domains of a text without what another text holds; see `_apart`."""
    key, domains = one
    rest = iter(_apart(file, (key, _all(domains)), other, warn))
    return {
        name: [document for document in itertools.islice(rest, len(documents)) if document is not None]
        for name, documents in domains.items()
    }


def _domains(file: StudyFile) -> Domains:
    """Return the domains of the calibration text that are given: one for each file, several for the embedded text."""
    domains = dict[str, Documents]()
    for place, name in enumerate(file.text.calibration_names):
        if name == EMBEDDED:
            domains |= _embedded_domains()
        elif name != SELF:
            domains[f"{place}-{Path(name).stem}"] = _read([name])
    return domains


def _shards(file: StudyFile, tokenizer: Any, domains: Domains, named: Named) -> tuple[Shard, ...]:
    """Cut a text that judges into shards; its files take turns, each with as many windows as its weight says."""
    each = file.text.windows_per_shard
    weights = dict(zip(domains, named.values(), strict=True)) if isinstance(named, Mapping) else None
    flat = texts.mixed_windows(tokenizer, domains, file.text.window, file.text.shards * each, weights, in_turn=True)
    return tuple(flat[start : start + each] for start in range(0, len(flat), each))


def _judging(file: StudyFile, key: str) -> Domains:
    """Return the documents of the search or the report text, by file."""
    named: Named = getattr(file.text, key)
    if isinstance(named, str):
        return {EMBEDDED: _embedded_search() if key == "search" else _embedded_report()}
    return {f"{place}-{Path(name).stem}": _read([name]) for place, name in enumerate(named)}


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


def _apart(
    file: StudyFile, one: tuple[str, Documents], other: tuple[str, Documents], warn: Say
) -> Sequence[texts.Document | None]:
    """Return the documents of a text without what the other holds; None for one of which nothing is left.

    A plan must be judged on text that it was not fitted to.

    Args:
        file: The study file.
        one: The key and the documents of the text that may lose something.
        other: Those of the text that stays as it is.
        warn: Told what is left out.

    Raises:
        UsageError: They share more than MOST_SHARED of the first.
    """
    (name, documents), (kept, others) = one, other
    if all(_is_embedded(file, key) for key in (name, kept)):
        return documents  # the embedded texts share nothing by construction
    shared = _compared(tuple(documents), tuple(others))
    if not shared.characters:
        return documents
    share = f"{max(shared.share, 1e-4):.2%} of text.{name}"
    if shared.share > MOST_SHARED:
        pair = " and ".join(f"text.{key}" for key in ("calibration", "search", "report") if key in (name, kept))
        found = (
            shared.same or f"{share}, where up to {MOST_SHARED:.0%} is left out: {'; '.join(map(str, shared.examples))}"
        )
        raise UsageError(
            f"text: {pair} share text: {found}; a plan must be judged on text that it was not fitted to: take it out "
            "of one"
        )
    warn(f"text: {share} is in text.{kept} too and is left out: {shared.examples[0]}")
    return shared.rest


def _is_embedded(file: StudyFile, key: str) -> bool:
    if key == "calibration":
        return EMBEDDED in file.text.calibration_names and {EMBEDDED, SELF} >= set(file.text.calibration_names)
    return bool(getattr(file.text, key) == EMBEDDED)


@functools.lru_cache(maxsize=4)
def _compared(first: tuple[texts.Document, ...], second: tuple[texts.Document, ...]) -> shared_text.Shared:
    return shared_text.compare(first, second)


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


def report_shards(file: StudyFile, of: StudyTexts, warn: Say = silent) -> tuple[Shard, ...]:
    """Cut the report text, without what calibration or search saw, into shards; return () where there is none.

    Args:
        file: The study file.
        of: The study's texts.
        warn: Told what is left out of the report text.

    Raises:
        UsageError: It shares too much with one of them.
        TextError: It can't be read.
    """
    if file.text.report is None:
        return ()
    domains = _judging(file, "report")
    for name, others in (("calibration", calibration_documents(of)), ("search", _all(_judging(file, "search")))):
        domains = _without(file, ("report", domains), (name, others), warn)
    return _shards(file, of.moments.tokenizer, domains, file.text.report)
