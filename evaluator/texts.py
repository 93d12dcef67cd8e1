"""Functions that read documents, keep them apart and cut them into windows of token ids; no model is needed.

Text is split by document, so that the text that a compression is fitted to and the text that judges it share nothing.
`evaluator.shared_text` finds what texts from elsewhere share; `evaluator.embedded_texts` has text for studies that name
none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluator import text_files
from evaluator.errors import TextError, install
from readers import json_reader
from readers.errors import ReadError

GROUPED_CHARACTERS = 2000  # paragraphs of a .txt file are grouped into documents of at least this length
ROUNDING = 1e-9  # of shares of windows
MOST_TEXT = 32  # a text is tokenized up to this multiple of the tokens that are asked for
HUB = "hub:"  # begins the name of a Hugging Face dataset among the paths of a text
MOST_ROWS = 5000  # rows of a dataset that are read by default
PASSAGE_CHARACTERS = 80  # the length from which on two texts share a paragraph or a line by no accident


@dataclasses.dataclass(frozen=True)
class Document:
    """A named text that is never split between two uses.

    Attributes:
        lines: The lines of its file on which its paragraphs begin, where these are known.
    """

    name: str
    text: str
    lines: tuple[int, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def place(self, line: int) -> str:
        """Name a line of the text, counted from 0, by its file and the line there; else by the document's name."""
        begins = 0
        for paragraph, first in zip(self.text.split("\n\n"), self.lines, strict=False):
            height = paragraph.count("\n") + 2
            if line < begins + height:
                return f"{self.name.rpartition(':')[0]}:{first + line - begins}"
            begins += height
        return self.name


def read_documents(paths: Iterable[str | Path]) -> list[Document]:
    """Read the documents of UTF-8 files and of datasets.

    A `.txt` file gives neighbouring paragraphs, separated by blank lines, in groups. A `.jsonl` file gives the "text"
    of each line. `hub:ORG/NAME`, `hub:ORG/NAME:CONFIG` and `hub:ORG/NAME:CONFIG:SPLIT:COLUMN` give a dataset's rows,
    see `dataset_documents`; an empty part is its default.

    Raises:
        TextError: A file or a dataset cannot be read.
    """
    found: list[Document] = []
    for path in map(Path, paths):
        if str(path).startswith(HUB):
            found += _from_hub(str(path))
            continue
        content = text_files.content_of(path, "text", ".txt or .jsonl", plain=path.suffix == ".txt")
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
    lines: list[int] = []
    line, parts = 1, content.split("\n\n")
    for part in parts:
        start = line + len(part) - len(part.lstrip("\n"))
        for piece in text_files.pieces(part.strip("\n")) if part.strip() else ():
            group.append(piece)
            lines.append(start)
            if sum(map(len, group)) >= GROUPED_CHARACTERS:
                found.append(Document(f"{path.name}:{len(found)}", "\n\n".join(group), tuple(lines)))
                group, lines = [], []
        line += part.count("\n") + 2
    if group:
        found.append(Document(f"{path.name}:{len(found)}", "\n\n".join(group), tuple(lines)))
    return found


def _from_jsonl(path: Path, content: str) -> list[Document]:
    found = []
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines would break a string at U+2028
        if not line.strip():
            continue
        try:
            text = json_reader.parse(line, finite=False)["text"]
        except (ReadError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise TextError(f'text {path}, line {number}: is not a JSON object with a string "text"; mend the line')
        found.append(Document(f"{path.name}:{number}", text))
    return found


def _from_hub(path: str) -> list[Document]:
    parts = path.removeprefix(HUB).split(":")
    if not parts[0] or len(parts) > 4:
        raise TextError(f"text {path}: is no dataset's name; write {HUB}ORG/NAME or {HUB}ORG/NAME:CONFIG:SPLIT:COLUMN")
    name, config, its_split, column = (*parts, "", "", "")[:4]
    return dataset_documents(name, config=config or None, split=its_split or "train", column=column or "text")


def dataset_documents(
    name: str, *, config: str | None = None, split: str = "train", column: str = "text", limit: int = MOST_ROWS
) -> list[Document]:
    """Return the first rows with text of a Hugging Face dataset; it is streamed, and no code of it is run.

    Neighbouring rows are grouped like the paragraphs of a .txt file, since a row of many datasets is one line.

    Args:
        name: ORG/NAME on the hub, or a directory that the library `datasets` can read.
        config: The name of the dataset's configuration.
        split: The split to read.
        column: The column that holds text.
        limit: The number of rows to read.

    Raises:
        TextError: The library is not installed, or the dataset cannot be read or holds no text.
    """
    where = f"text {HUB}{name}"
    if limit < 1:
        raise TextError(f"{where}: a limit of {limit} rows leaves none; take 1 or more")
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise TextError(
            f"{where}: the library datasets is not installed; {install('hub')}, or name .txt or .jsonl files"
        ) from None
    try:
        if not Path(name).is_dir():
            _require_hub(name)
        rows = datasets.load_dataset(name, config, split=split, streaming=True, trust_remote_code=False)
        columns = rows.column_names or list(next(iter(rows)))
        if column not in columns:
            raise TextError(f"{where}: it has no column {column!r}; its columns are {', '.join(columns)}")
        texts = []
        for number, row in enumerate(rows.select_columns(column)):
            if not isinstance(row[column], str):
                raise TextError(f"{where}, row {number}: its {column!r} is no text; name another column")
            if row[column].strip():
                texts.append((number, row[column].strip("\n")))
            if len(texts) == limit:
                break
    except TextError:
        raise
    except Exception as error:  # its readers raise many kinds: it is data from outside
        first = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise TextError(
            f"{where}: can't be read ({first}); check its name, config and split, or where the hub can't be reached "
            "name .txt or .jsonl files, or a directory with a copy"
        ) from None
    if not texts:
        raise TextError(f"{where}: its column {column!r} holds no text in split {split}; name another")
    return _grouped(f"{HUB}{name}:{split}", texts)


def _require_hub(name: str) -> None:
    """Ask the hub once whether a dataset exists: `load_dataset` would try for half a minute before it gives up."""
    import huggingface_hub

    if not huggingface_hub.constants.HF_HUB_OFFLINE:  # offline, the hub's cache is read
        huggingface_hub.HfApi().dataset_info(name, timeout=10.0)


def _grouped(name: str, numbered: Iterable[tuple[int, str]]) -> list[Document]:
    """Join neighbours to documents of at least GROUPED_CHARACTERS, named by their first number."""
    found: list[Document] = []
    group: list[str] = []
    first = 0
    for number, text in numbered:
        first = first if group else number
        group.append(text)
        if sum(map(len, group)) >= GROUPED_CHARACTERS:
            found.append(Document(f"{name}:{first}", "\n\n".join(group)))
            group = []
    if group:
        found.append(Document(f"{name}:{first}", "\n\n".join(group)))
    return found


def passages(text: str) -> Iterator[str]:
    """Yield the paragraphs, and the lines of paragraphs of several lines: normalized, of PASSAGE_CHARACTERS or more."""
    for paragraph in paragraphs(text):
        lines = paragraph.split("\n")
        for part in (paragraph, *(lines if len(lines) > 1 else ())):
            passage = _normal(part)
            if len(passage) >= PASSAGE_CHARACTERS:
                yield passage


def paragraphs(text: str) -> list[str]:
    """Return the parts of a text between blank lines."""
    return [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def split(documents: Sequence[Document], calibration_share: float = 0.6) -> tuple[list[Document], list[Document]]:
    """Return (calibration, search): whole documents, dealt out along the sequence.

    Raises:
        TextError: A share of 0 or 1 or beyond leaves one part empty.
    """
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


def windows(
    tokenizer: Any, documents: Sequence[Document], length: int, count: int, *, or_fewer: bool = False
) -> list[list[int]]:
    """Return windows of token ids without overlap, spread evenly over the text.

    Each begins with BOS where the tokenizer puts it before a text: models that were always given it, such as Gemma 3,
    are lost without.

    Args:
        tokenizer: A transformers tokenizer.
        documents: The text.
        length: The token ids of a window, BOS among them.
        count: The number of windows.
        or_fewer: Whether a shorter text gives what it has, at least one window.

    Raises:
        TextError: The text is too short.
    """
    return mixed_windows(tokenizer, {"text": documents}, length, count, or_fewer=or_fewer)


def mixed_windows(
    tokenizer: Any,
    domains: Mapping[str, Sequence[Document]],
    length: int,
    count: int,
    weights: Mapping[str, float] | None = None,
    *,
    in_turn: bool = False,
    or_fewer: bool = False,
) -> list[list[int]]:
    """Return `windows` of several texts, domain after domain.

    Args:
        tokenizer: A transformers tokenizer.
        domains: The texts.
        length: The token ids of a window.
        count: The number of windows in all.
        weights: What share of the windows each text gives, except where one is too short for that; None: all the same.
        in_turn: Whether the windows of the texts take turns, so that every beginning of the result is mixed alike.
        or_fewer: Whether shorter texts give what they have, at least one window together.

    Raises:
        TextError: All texts together are too short.
    """
    if length < 2 or count < 1:
        raise TextError(f"text: {count} windows of {length} tokens: at least 1 of 2 tokens are needed")
    first = lead(tokenizer)
    each = length - len(first)  # tokens of the text
    streams = {name: _stream(tokenizer, documents, each * count) for name, documents in domains.items()}
    possible = {name: len(stream) // each for name, stream in streams.items()}
    if or_fewer:
        count = min(count, sum(possible.values())) or count  # without one window the error names what was asked for
    shares = {name: 1.0 if weights is None else weights[name] for name in domains}
    taken: dict[str, int] = {}
    for name in sorted(possible, key=lambda name: possible[name] / shares[name]):  # the shortest leaves more to others
        left = math.fsum(share for other, share in shares.items() if other not in taken)
        taken[name] = min(possible[name], int((count - sum(taken.values())) * shares[name] / left + ROUNDING))
    if sum(taken.values()) < count:
        raise TextError(
            f"text: {count} windows of {length} tokens were asked for, and {sum(map(len, domains.values()))} documents "
            f"hold {sum(map(len, streams.values()))} tokens, which makes {sum(possible.values())}; give more text, or "
            "ask for fewer or shorter windows"
        )
    order = [(name, index) for name in streams for index in range(taken[name])]
    if in_turn:
        order.sort(key=lambda one: (one[1] + 0.5) / taken[one[0]])
    starts = [(name, (index * possible[name] // taken[name]) * each) for name, index in order]
    return [first + streams[name][start : start + each] for name, start in starts]


def all_windows(tokenizer: Any, documents: Sequence[Document], length: int) -> list[list[int]]:
    """Return every one of the `windows` of a text; a shorter rest is dropped."""
    first, stream = lead(tokenizer), _stream(tokenizer, documents)
    each = length - len(first)
    return [first + stream[start : start + each] for start in range(0, len(stream) - each + 1, each)]


def lead(tokenizer: Any) -> list[int]:
    """Return [BOS] if the tokenizer begins a text with it, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer.encode("a", verbose=False))[:1] == [bos] else []


def _stream(tokenizer: Any, documents: Sequence[Document], tokens: float = math.inf) -> list[int]:
    """Return the text as token ids, enough of it to spread `tokens` of them over it."""
    stream: list[int] = []
    for document in documents:
        stream += tokenizer.encode(document.text + "\n\n", add_special_tokens=False, verbose=False)
        if len(stream) >= MOST_TEXT * tokens:
            break
    return stream


def text_digest(windows: Sequence[Sequence[int]]) -> str:
    """Return 16 hexadecimal digits that name a text as a model reads it."""
    text = json.dumps([list(window) for window in windows], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
