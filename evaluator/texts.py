"""Documents in, fixed windows of token ids out. Knows no model.

Text is split by document, so that what a compression is fitted to and what it is judged on share nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evaluator.errors import TextError

GROUPED_CHARACTERS = 2000  # paragraphs of a .txt file are grouped into documents of at least so many
MOST_TEXT = 32  # a text is read up to this multiple of the tokens that are asked for


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    text: str


def embedded_documents() -> list[Document]:
    """English prose that every CPython ships: the language reference in `pydoc_data.topics`, sorted by name.

    Topics quote each other at length. A paragraph stays where it comes first and nowhere else, or else the parts
    of a split would share text. The text depends on Python's minor version: see `text_digest`.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    found = []
    for name in sorted(topics):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
        if kept:
            found.append(Document(name, "\n\n".join(kept)))
    return found


def read_documents(paths: Iterable[str | Path]) -> list[Document]:
    """UTF-8 files. `.txt`: neighbouring paragraphs (split by blank lines) grouped; `.jsonl`: "text" of each line.

    Raises TextError.
    """
    found: list[Document] = []
    for path in map(Path, paths):
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise TextError(f"text {path}: can't be read: {reason}; name .txt or .jsonl files in UTF-8") from None
        if path.suffix == ".jsonl":
            found += _from_jsonl(path, content)
        elif path.suffix == ".txt":
            found += _from_txt(path, content)
        else:
            raise TextError(f"text {path}: {path.suffix or 'no suffix'} is not known; name .txt or .jsonl files")
    return found


def _from_txt(path: Path, content: str) -> list[Document]:
    found: list[Document] = []
    group: list[str] = []
    paragraphs = [paragraph.strip("\n") for paragraph in content.split("\n\n") if paragraph.strip()]
    for number, paragraph in enumerate(paragraphs, start=1):
        group.append(paragraph)
        if sum(map(len, group)) >= GROUPED_CHARACTERS or number == len(paragraphs):
            found.append(Document(f"{path.name}:{len(found)}", "\n\n".join(group)))
            group = []
    return found


def _from_jsonl(path: Path, content: str) -> list[Document]:
    found = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise TextError(f'text {path}, line {number}: is not a JSON object with a string "text"; mend the line')
        found.append(Document(f"{path.name}:{number}", text))
    return found


def split(documents: Sequence[Document], calibration_share: float = 0.6) -> tuple[list[Document], list[Document]]:
    """(calibration, search): whole documents, dealt out along the sequence so that the shares of the text hold."""
    if not 0.0 < calibration_share < 1.0:
        raise TextError(
            f"text: a calibration share of {calibration_share} leaves one part empty; take one between 0 and 1"
        )
    calibration: list[Document] = []
    search: list[Document] = []
    dealt = total = 0
    for document in documents:
        size = len(document.text)
        total += size
        if dealt + size / 2 <= calibration_share * total:
            calibration.append(document)
            dealt += size
        else:
            search.append(document)
    return calibration, search


def windows(tokenizer: Any, documents: Sequence[Document], length: int, count: int) -> list[list[int]]:
    """`count` windows of `length` token ids, without overlap or BOS, spread evenly over the text.

    tokenizer: a transformers tokenizer. Raises TextError when the text is too short.
    """
    if length < 2 or count < 1:
        raise TextError(f"text: {count} windows of {length} tokens: at least 1 of 2 tokens are needed")
    stream: list[int] = []
    for document in documents:
        stream += tokenizer.encode(document.text + "\n\n", add_special_tokens=False, verbose=False)
        if len(stream) >= MOST_TEXT * length * count:
            break
    there = len(stream) // length
    if there < count:
        raise TextError(
            f"text: {count} windows of {length} tokens were asked for, and {len(documents)} documents hold "
            f"{len(stream)} tokens, which makes {there}; give more text, or ask for fewer or shorter windows"
        )
    starts = [(index * there // count) * length for index in range(count)]
    return [stream[start : start + length] for start in starts]


def text_digest(windows: Sequence[Sequence[int]]) -> str:
    """Names a text as a model reads it: 16 hexadecimal digits."""
    text = json.dumps([list(window) for window in windows], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
