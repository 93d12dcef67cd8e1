"""Read text files, within limits on the sizes of a file and of a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evaluator.errors import TextError
from readers import regular
from readers.errors import ReadError

MOST_BYTES = 500_000_000  # of a file
MOST_LINE = 10_000_000  # characters of a line, and of a document: a tokenizer takes a document at once


def content_of(path: Path, what: str, kinds: str, *, plain: bool = False) -> str:
    """Return the text of a UTF-8 file, which must be of a size that can be tokenized, as must its lines.

    Args:
        path: The file.
        what: What it is, for messages.
        kinds: The kinds of file to name instead, for messages.
        plain: Whether it is plain text, whose lines may also end with CR or CR LF; they are returned with LF.

    Raises:
        TextError: It is no regular file of UTF-8, or is too large.
    """
    try:
        content = regular.read_text(path, MOST_BYTES)
    except (OSError, ReadError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TextError(f"{what} {path}: can't be read: {reason}; name {kinds} files in UTF-8") from None
    if plain:
        content = content.replace("\r\n", "\n").replace("\r", "\n")
    begin = 0
    while len(content) - begin > MOST_LINE:
        end = content.rfind("\n", begin, begin + MOST_LINE + 1)  # past many lines at once
        if end < 0:
            end = content.find("\n", begin)
            length = (len(content) if end < 0 else end) - begin
            number = content.count("\n", 0, begin) + 1
            raise TextError(
                f"{what} {path}, line {number}: holds {length:,} characters, and at most {MOST_LINE:,} are read; "
                "break it into lines"
            )
        begin = end + 1
    return content


def json_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a JSONL file that hold something, with their numbers from 1; see `content_of`."""
    content = content_of(path, what, "JSONL")
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines would break a string at U+2028
        if line.strip():
            yield number, line


def pieces(paragraph: str) -> Iterator[str]:
    """Yield a paragraph, or one that is too long for a document in parts that end with a line."""
    begin = 0
    while len(paragraph) - begin > MOST_LINE:
        end = paragraph.rfind("\n", begin, begin + MOST_LINE + 1)  # found, since no line is longer
        yield paragraph[begin:end]
        begin = end + 1
    yield paragraph[begin:]
