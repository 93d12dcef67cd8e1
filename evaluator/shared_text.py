"""Finds the passages that two texts share, and leaves them out of the first.

A passage is shared where both texts hold
- the same whole document, whatever its length,
- the same paragraph or line of at least PASSAGE_CHARACTERS characters, or
- the same run of at least RUN_CHARACTERS characters, wherever it begins, in a document of each.

Case, white space, the wrapping of lines and the Unicode form of a character make no difference (NFKC, then casefold).
White space is not counted in a run.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from evaluator.texts import PASSAGE_CHARACTERS, Document

RUN_CHARACTERS = 300  # the length from which on two texts share a part of a paragraph by no accident
BLOCK = RUN_CHARACTERS // 2  # every run of RUN_CHARACTERS holds a whole block of the second text
MOST_PLACES = 16  # the places of a block that are tried
BASE = 0x9E3779B97F4A7C15  # of the rolling hash; odd, so that it has an inverse
TABLE_BITS = 22  # of the hashes of blocks that are looked up first
LEAST_LETTERS = 10  # the different characters of a block; below that it is a ruler or a table of zeros
EXAMPLES = 3  # the quotations of what is shared
QUOTED = 60  # characters of a quotation
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
WORD = re.compile(r"\S+")
BLANK_LINES = re.compile(r"\A\s*\n|\n\s*\Z")  # at the beginning and the end

Span = tuple[int, int]  # [start, end) in a document's text


@dataclasses.dataclass(frozen=True)
class Example:
    """Example quotes a passage, and names where the first and the second text hold it."""

    quoted: str
    first: str
    second: str

    def __str__(self) -> str:
        """Return the example as people read it."""
        return f'{self.first} and {self.second} both hold "{self.quoted}"'


@dataclasses.dataclass(frozen=True)
class Shared:
    """Shared says what the first of two texts holds of the second, and what is left of it without that.

    Attributes:
        characters: The number of characters of the shared passages, each counted once.
        total: The number of characters of the first text, in which a shared passage that recurs counts once.
        examples: A few of the passages.
        rest: The documents of the first text without the passages, in their order; None where nothing is left.
        same: Which documents are the same, where the second text holds all documents of the first; else "".
    """

    characters: int
    total: int
    examples: tuple[Example, ...]
    rest: tuple[Document | None, ...]
    same: str

    @property
    def share(self) -> float:
        """The share of the first text that the second holds too, from 0 to 1."""
        return self.characters / self.total if self.total else 0.0


def compare(first: Sequence[Document], second: Sequence[Document]) -> Shared:
    """Find what the first text shares with the second.

    What is left of the first text shares nothing with the second.
    """
    index = _Index(second)
    rest: list[Document | None] = []
    found: dict[str, int] = {}
    examples: list[Example] = []
    same: list[str] = []
    total = filled = 0
    for document in first:
        left: Document | None = document
        lines = _Lines.of(document.text)
        total += lines.size
        filled += lines.size > 0
        while left is not None:
            passages = list(index.shared_with(left, lines))
            if not passages:
                break
            if passages[0].whole and left is document:
                same.append(index.equal(document, passages[0]))
            for passage in passages:
                if passage.folded in found:
                    total -= len(passage.folded)
                elif len(examples) < EXAMPLES:
                    examples.append(index.example(left, passage))
                found[passage.folded] = len(passage.folded)
            left = _without(left, [span for passage in passages for span in passage.spans])
            lines = _Lines.of(left.text if left else "")  # what is left may be equal to something else
        rest.append(left)
    return Shared(
        sum(found.values()), total, tuple(examples), tuple(rest), same=same[0] if 0 < filled == len(same) else ""
    )


@dataclasses.dataclass(frozen=True)
class _Lines:
    """Holds a document in the form in which it is compared.

    Attributes:
        keys: The lines, folded and without white space; "" for a blank one.
        lengths: The lengths of the lines with single spaces between words, by which they are long enough or not.
    """

    keys: list[str]
    lengths: list[int]

    @classmethod
    def of(cls, text: str) -> _Lines:
        words = [line.split() for line in _folded(text).split("\n")]
        keys = ["".join(line) for line in words]
        lengths = [len(key) + len(line) - 1 for key, line in zip(keys, words, strict=True)]
        if not text.isascii():  # NFKC may shorten a line: one that is long enough as it is written stays so
            written = (len(" ".join(line.split()).casefold()) for line in text.split("\n"))
            lengths = [max(pair) for pair in zip(lengths, written, strict=True)]
        return cls(keys, lengths)

    @property
    def size(self) -> int:
        return sum(map(len, self.keys))

    def key(self, lines: range) -> str:
        return "".join(self.keys[lines.start : lines.stop])

    def long_parts(self) -> Iterator[range]:
        """Yield each paragraph that is long enough, then the lines of it that are."""
        for filled, group in itertools.groupby(range(len(self.keys)), key=lambda number: bool(self.keys[number])):
            numbers = list(group)
            if filled and sum(self.lengths[number] + 1 for number in numbers) > PASSAGE_CHARACTERS:
                yield range(numbers[0], numbers[-1] + 1)
                if len(numbers) > 1:
                    yield from (range(n, n + 1) for n in numbers if self.lengths[n] >= PASSAGE_CHARACTERS)


@dataclasses.dataclass(frozen=True)
class _Passage:
    """Holds what a document shares with the second text.

    Attributes:
        spans: Its places in the document.
        folded: Its folded form without white space.
        number: The number of the document of the second text that holds it.
        place: Its place there: in the document without white space.
        whole: Whether it is the whole document.
    """

    spans: tuple[Span, ...]
    folded: str
    number: int
    place: int
    whole: bool = False


class _Index:
    """Answers what a document shares with a text."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self._whole: dict[str, int] = {}
        self._parts: dict[str, tuple[int, int]] = {}  # the document, and the place in its key
        self._runs = _Runs()
        for number, document in enumerate(documents):
            lines = _Lines.of(document.text)
            key = "".join(lines.keys)
            if key:
                self._whole.setdefault(key, number)
            ends = _sums(map(len, lines.keys))
            for part in lines.long_parts():
                self._parts.setdefault(lines.key(part), (number, ends[part.start]))
            self._runs.add(key)

    def shared_with(self, document: Document, lines: _Lines) -> Iterator[_Passage]:
        """Yield the passages of a document that this text holds too: the longer kinds first."""
        key = "".join(lines.keys)
        if not key:
            return
        if key in self._whole:
            yield _Passage(((0, len(document.text)),), key, self._whole[key], 0, whole=True)
            return
        starts = _sums(map(len, document.text.split("\n")), 1)
        covered = bytearray(len(lines.keys))
        for part in lines.long_parts():
            own = lines.key(part)
            if own in self._parts and not covered[part.start]:
                covered[part.start : part.stop] = b"\1" * len(part)
                yield _Passage(((starts[part.start], starts[part.stop] - 1),), own, *self._parts[own])
        ends = _sums(map(len, lines.keys))
        words = functools.cache(lambda line: _Words(document.text[starts[line] : starts[line + 1] - 1]))
        for start, end, number, place in self._runs.shared_with(key):
            spans, pieces = [], []
            for line in range(bisect.bisect_right(ends, start) - 1, bisect.bisect_left(ends, end)):
                low, high = max(start, ends[line]), min(end, ends[line + 1])
                if low < high and not covered[line]:
                    first, last = words(line).span(low - ends[line], high - ends[line])
                    spans.append((starts[line] + first, starts[line] + last))
                    pieces.append(key[low:high])
            if spans:
                yield _Passage(tuple(spans), "".join(pieces), number, place)

    def equal(self, document: Document, passage: _Passage) -> str:
        """Say with which document a document is the same."""
        quoted = " ".join(document.text.split()).casefold()
        if len(quoted) > PASSAGE_CHARACTERS:
            quoted = f"{quoted[: PASSAGE_CHARACTERS - 1]}…"
        return f'{document.name} and {self._documents[passage.number].name} are the same: "{quoted}"'

    def example(self, document: Document, passage: _Passage) -> Example:
        """Quote a passage of a document."""
        start, end = passage.spans[0][0], passage.spans[-1][1]
        quoted = " ".join(document.text[start : min(end, start + 4 * QUOTED)].split())
        if len(quoted) > QUOTED:
            quoted = f"{quoted[: QUOTED - 1]}…"
        other = self._documents[passage.number]
        there = bisect.bisect_right(_sums(map(len, _Lines.of(other.text).keys)), passage.place) - 1
        return Example(quoted, document.place(document.text.count("\n", 0, start)), other.place(there))


class _Words:
    """Finds the words of a line that hold a part of its key."""

    def __init__(self, line: str) -> None:
        found = list(WORD.finditer(line))
        self._spans = [word.span() for word in found]
        self._ends = _sums(len("".join(_folded(word[0]).split())) for word in found)

    def span(self, start: int, end: int) -> Span:
        """Return where the words begin and end that hold the characters [start, end) of the key."""
        first = bisect.bisect_right(self._ends, start) - 1
        last = bisect.bisect_left(self._ends, end) - 1
        most = len(self._spans) - 1
        return self._spans[min(first, most)][0], self._spans[min(max(first, last), most)][1]


class _Runs:
    """Finds the long runs that a string shares with others.

    The others are cut into blocks of BLOCK characters, so that every run of RUN_CHARACTERS holds a whole one. Rolling
    hashes tell where one may begin; what begins there is then compared itself.
    """

    def __init__(self) -> None:
        self._others: list[str] = []
        self._blocks: dict[str, list[tuple[int, int]]] = {}  # the strings and the places in them

    def add(self, other: str) -> None:
        self._others.append(other)
        for start in range(0, len(other) - BLOCK + 1, BLOCK) if len(other) >= RUN_CHARACTERS else ():
            block = other[start : start + BLOCK]
            if len(set(block)) >= LEAST_LETTERS:
                self._blocks.setdefault(block, []).append((len(self._others) - 1, start))

    @functools.cached_property
    def _hashed(self) -> Any:
        """Whether a block has the hash, by the hash's first TABLE_BITS bits."""
        codes = _codes("".join(self._blocks)).reshape(len(self._blocks), BLOCK)
        table = np.zeros(1 << TABLE_BITS, dtype=bool)
        table[(codes * _powers(BLOCK)[1]).sum(axis=1) >> np.uint64(64 - TABLE_BITS)] = True
        return table

    def shared_with(self, key: str) -> Iterator[tuple[int, int, int, int]]:
        """Yield (start, end, number of the other string, place in it) of the runs of a string, one after the other."""
        if len(key) < RUN_CHARACTERS or not self._blocks:
            return
        done = 0
        for start in np.flatnonzero(self._hashed[_rolling(key) >> np.uint64(64 - TABLE_BITS)]).tolist():
            places = self._blocks.get(key[start : start + BLOCK], [])
            if start < done or not places:
                continue
            begin, end, number, place = max(
                (self._around(key, start, number, place) for number, place in places[:MOST_PLACES]),
                key=lambda run: run[1] - run[0],
            )
            if end - begin >= RUN_CHARACTERS:
                yield max(begin, done), end, number, place
                done = end

    def _around(self, key: str, start: int, number: int, place: int) -> tuple[int, int, int, int]:
        """Return the whole run around a place that two strings share."""
        other = self._others[number]
        before = _longest(lambda n: key[start - n : start] == other[place - n : place], min(start, place))
        after = _longest(
            lambda n: key[start : start + n] == other[place : place + n], min(len(key) - start, len(other) - place)
        )
        return start - before, start + after, number, place - before


def _rolling(text: str) -> Any:
    """Return a hash of every part of BLOCK characters, uint64 [characters - BLOCK + 1]."""
    codes = _codes(text)
    up, down = _powers(len(codes))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * down)])
    return (sums[BLOCK:] - sums[:-BLOCK]) * up[: len(codes) - BLOCK + 1]


def _codes(text: str) -> Any:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)


def _powers(count: int) -> Any:
    """Return the powers of BASE, and those of its inverse, modulo 2^64: uint64 [2, count]."""
    factors = np.full((2, count), [[BASE], [pow(BASE, -1, 1 << 64)]], dtype=np.uint64)
    factors[:, 0] = 1
    return np.cumprod(factors, axis=1)


def _longest(holds: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that holds, where all smaller ones hold too."""
    step = 1
    while step < most and holds(step):
        step *= 2
    low, high = step // 2, min(step, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _folded(text: str) -> str:
    """Return a text in the form in which case and Unicode form make no difference; its lines stay."""
    if text.isascii():
        return text.lower()
    plain = unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).casefold()
    return unicodedata.normalize("NFKC", plain)


def _sums(lengths: Iterable[int], between: int = 0) -> list[int]:
    """Return where each of several strings begins that follow each other, and where the last one ends."""
    return list(itertools.accumulate((length + between for length in lengths), initial=0))


def _without(document: Document, spans: Sequence[Span]) -> Document | None:
    """Return a document without parts of its text; what stood apart stays apart. None where nothing is left."""
    pieces, at = [], 0
    for start, end in sorted(spans):
        pieces.append(document.text[at:start])
        at = max(at, end)
    pieces.append(document.text[at:])
    kept = [BLANK_LINES.sub("", piece) for piece in pieces if piece.strip()]
    return dataclasses.replace(document, text="\n\n".join(kept), lines=()) if kept else None
