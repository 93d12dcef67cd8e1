"""Documents in, fixed windows of token ids out. Knows no model.

Text is split by document, so that what a compression is fitted to and what it is judged on share nothing; `overlap`
finds what texts from elsewhere share.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluator.errors import TextError

GROUPED_CHARACTERS = 2000  # paragraphs of a .txt file are grouped into documents of at least so many
MOST_TEXT = 32  # a text is read up to this multiple of the tokens that are asked for
HUB = "hub:"  # begins the name of a Hugging Face dataset among the paths of a text
MOST_ROWS = 5000  # of a dataset, read unless more are asked for
PASSAGE_CHARACTERS = 80  # of a paragraph or a line, from which on sharing it is no accident
EXAMPLES = 3  # of an overlap, quoted
REPORT_CHARACTERS = 200_000  # of the embedded report text
NOT_EVERYWHERE = {  # of the standard library: what distributions leave out or change
    *("distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtle", "turtledemo", "venv")
}


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


def embedded_report_documents() -> list[Document]:
    """English prose for reports, apart from `embedded_documents`: docstrings of the standard library's modules.

    Those of modules and of their classes, sorted by module; paragraphs of prose alone, each once; read from the
    sources, none of which is imported. About 200 kB, dependent on Python's version. Raises TextError where no sources
    are.
    """
    return list(_embedded_report())


@functools.cache
def _embedded_report() -> tuple[Document, ...]:
    library = Path(sysconfig.get_path("stdlib"))
    seen = {passage for document in embedded_documents() for passage in _passages(document.text)}
    found = []
    size = 0
    for name, file in _library_files(library):
        kept = []
        for paragraph in _docstring_paragraphs(file):
            passages = set(_passages(paragraph))
            if passages and not passages & seen and _is_prose(paragraph):
                seen |= passages
                kept.append(paragraph)
        if kept:
            found.append(Document(name, "\n\n".join(kept)))
            size += len(found[-1].text)
        if size >= REPORT_CHARACTERS:
            break
    if not found:
        raise TextError(f"text: {library} holds no sources of the standard library; name .txt or .jsonl files instead")
    return tuple(found)


DOMAIN_CHARACTERS = 400_000  # of each embedded domain, at most


def embedded_domains() -> dict[str, list[Document]]:
    """Text of several kinds to calibrate on, from what every CPython ships, apart from the embedded search and report
    texts: `topics` (the calibration part of `embedded_documents`), `docstrings` (those of functions and methods) and
    `code` (sources without their docstrings).
    """
    return {name: list(documents) for name, documents in _embedded_domains().items()}


@functools.cache
def _embedded_domains() -> dict[str, tuple[Document, ...]]:
    topics, search = split(embedded_documents())
    seen = {passage for document in (*topics, *search, *_embedded_report()) for passage in _passages(document.text)}
    found: dict[str, list[Document]] = {"docstrings": [], "code": []}
    sizes = dict.fromkeys(found, 0)
    for name, file in _library_files(Path(sysconfig.get_path("stdlib"))):
        for domain, paragraphs in zip(found, _function_docstrings_and_code(file), strict=True):
            kept = []
            for paragraph in paragraphs:
                passages = set(_passages(paragraph))
                if not passages & seen:
                    seen |= passages
                    kept.append(paragraph)
            if sum(map(len, kept)) >= GROUPED_CHARACTERS and sizes[domain] < DOMAIN_CHARACTERS:
                found[domain].append(Document(f"{domain}:{name}", "\n\n".join(kept)))
                sizes[domain] += len(found[domain][-1].text)
        if min(sizes.values()) >= DOMAIN_CHARACTERS:
            break
    return {"topics": tuple(topics), **{name: tuple(documents) for name, documents in found.items()}}


def _function_docstrings_and_code(file: Path) -> tuple[list[str], list[str]]:
    """Paragraphs of a source's function docstrings, and of what is left of it without any docstring."""
    try:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):  # a damaged file is not worth failing for
        return [], []
    docstrings: list[str] = []
    lines: list[str | None] = list(source.splitlines())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        place = node.body[0]
        lines[place.lineno - 1 : place.end_lineno] = [None] * ((place.end_lineno or place.lineno) - place.lineno + 1)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstrings += [paragraph.strip("\n") for paragraph in _paragraphs(docstring)]
    return docstrings, _paragraphs("\n".join(line for line in lines if line is not None))


def _library_files(library: Path) -> Iterator[tuple[str, Path]]:
    """(module, its source), sorted by top-level module and path."""
    for name in sorted(sys.stdlib_module_names - NOT_EVERYWHERE):
        files = [library / f"{name}.py"] if (library / f"{name}.py").is_file() else (library / name).rglob("*.py")
        for file in sorted(files):
            parts = file.relative_to(library).with_suffix("").parts
            if not {"test", "tests"} & set(parts):
                yield ".".join(parts).removesuffix(".__init__"), file


def _docstring_paragraphs(file: Path) -> Iterator[str]:
    with contextlib.suppress(OSError, SyntaxError, ValueError):  # a damaged file is not worth failing for
        tree = ast.parse(file.read_bytes())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for docstring in (ast.get_docstring(tree), *map(ast.get_docstring, classes)):
            for paragraph in _paragraphs(docstring or ""):
                yield paragraph.strip("\n")


def _is_prose(paragraph: str) -> bool:
    """Sentences: mostly letters, from a capital to a full stop, and no interpreter session."""
    flat = " ".join(paragraph.split())
    letters = sum(character.isalpha() or character == " " for character in flat)
    return flat[0].isupper() and flat[-1] in ".:!?" and letters >= 0.9 * len(flat) and ">>>" not in flat


def read_documents(paths: Iterable[str | Path]) -> list[Document]:
    """UTF-8 files, and datasets.

    `.txt`: neighbouring paragraphs (split by blank lines) grouped; `.jsonl`: "text" of each line. `hub:ORG/NAME`,
    `hub:ORG/NAME:CONFIG`, `hub:ORG/NAME:CONFIG:SPLIT:COLUMN`: see `dataset_documents`; an empty part is its default.
    Raises TextError.
    """
    found: list[Document] = []
    for path in map(Path, paths):
        if str(path).startswith(HUB):
            found += _from_hub(str(path))
            continue
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
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines would break a string at U+2028
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise TextError(f'text {path}, line {number}: is not a JSON object with a string "text"; mend the line')
        found.append(Document(f"{path.name}:{number}", text))
    return found


def _from_hub(path: str) -> list[Document]:
    parts = path.removeprefix(HUB).split(":")
    if not parts[0] or len(parts) > 4:
        raise TextError(f"text {path}: is no dataset's name; write {HUB}ORG/NAME or {HUB}ORG/NAME:CONFIG:SPLIT:COLUMN")
    name, config, of, column = (*parts, "", "", "")[:4]
    return dataset_documents(name, config=config or None, split=of or "train", column=column or "text")


def dataset_documents(
    name: str, *, config: str | None = None, split: str = "train", column: str = "text", limit: int = MOST_ROWS
) -> list[Document]:
    """The first `limit` rows with text of a Hugging Face dataset, streamed: no more is fetched.

    name: ORG/NAME on the hub, or a directory that `datasets` can read. Neighbouring rows are grouped as the paragraphs
    of a .txt file are: in many datasets a row is a line. No code of a dataset is run. Needs the library `datasets`.
    Raises TextError.
    """
    where = f"text {HUB}{name}"
    if limit < 1:
        raise TextError(f"{where}: a limit of {limit} rows leaves none; take 1 or more")
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise TextError(
            f"{where}: the library datasets is not installed; run `pip install 'optuna-search[hub]'`, or name .txt or "
            ".jsonl files"
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
    except Exception as error:  # whatever its readers raise: it is data from outside
        first = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise TextError(
            f"{where}: can't be read ({first}); check its name, config and split, or where the hub can't be reached "
            "name .txt or .jsonl files, or a directory with a copy"
        ) from None
    if not texts:
        raise TextError(f"{where}: its column {column!r} holds no text in split {split}; name another")
    return _grouped(f"{HUB}{name}:{split}", texts)


def _require_hub(name: str) -> None:
    """One question, asked once: `load_dataset` would ask for half a minute before it gives up."""
    import huggingface_hub

    if not huggingface_hub.constants.HF_HUB_OFFLINE:  # else it is a copy in the hub's cache that is asked for
        huggingface_hub.HfApi().dataset_info(name, timeout=10.0)


def _grouped(name: str, numbered: Iterable[tuple[int, str]]) -> list[Document]:
    """Neighbours joined to documents of at least GROUPED_CHARACTERS, named by their first number."""
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


def overlap(first: Sequence[Document], second: Sequence[Document]) -> list[str]:
    """What both hold, as a few quoted examples that name the documents; empty when they are apart.

    Held by both is a whole document, or one of its paragraphs or lines of at least 80 characters. Case and white space
    make no difference.
    """
    whole, passages = _index(first)
    found: dict[str, str] = {}
    for document in second:
        text = _normal(document.text)
        shared = [(text, f"{whole[text]} and {document.name} are the same")] if text in whole else []
        shared += [
            (passage, f"{passages[passage]} and {document.name} both hold")
            for passage in _passages(document.text)
            if passage in passages
        ]
        for passage, where in shared:
            if not any(passage in known for known in found):  # the lines of a paragraph that is quoted already
                quoted = passage if len(passage) <= PASSAGE_CHARACTERS else f"{passage[: PASSAGE_CHARACTERS - 1]}…"
                found[passage] = f'{where}: "{quoted}"'
            if len(found) == EXAMPLES:
                return list(found.values())
    return list(found.values())


def _index(documents: Sequence[Document]) -> tuple[dict[str, str], dict[str, str]]:
    """(whole documents, passages), each normalised, with the name of the document that holds it first."""
    whole: dict[str, str] = {}
    passages: dict[str, str] = {}
    for document in documents:
        text = _normal(document.text)
        if text:
            whole.setdefault(text, document.name)
        for passage in _passages(document.text):
            passages.setdefault(passage, document.name)
    return whole, passages


def _passages(text: str) -> Iterator[str]:
    """Paragraphs, and the lines of those that have several, normalised, of PASSAGE_CHARACTERS or more."""
    for paragraph in _paragraphs(text):
        lines = paragraph.split("\n")
        for part in (paragraph, *(lines if len(lines) > 1 else ())):
            passage = _normal(part)
            if len(passage) >= PASSAGE_CHARACTERS:
                yield passage


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


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
    return mixed_windows(tokenizer, {"text": documents}, length, count)


def mixed_windows(
    tokenizer: Any, domains: Mapping[str, Sequence[Document]], length: int, count: int
) -> list[list[int]]:
    """The same of several texts, as many of each, but where one is too short for that; domain after domain.

    Raises TextError when all of them together are too short.
    """
    if length < 2 or count < 1:
        raise TextError(f"text: {count} windows of {length} tokens: at least 1 of 2 tokens are needed")
    streams = {name: _stream(tokenizer, documents, length * count) for name, documents in domains.items()}
    there = {name: len(stream) // length for name, stream in streams.items()}
    taken: dict[str, int] = {}
    for place, name in enumerate(sorted(there, key=lambda name: there[name])):  # the shortest leaves more to the others
        taken[name] = min(there[name], (count - sum(taken.values())) // (len(there) - place))
    if sum(taken.values()) < count:
        raise TextError(
            f"text: {count} windows of {length} tokens were asked for, and {sum(map(len, domains.values()))} documents "
            f"hold {sum(map(len, streams.values()))} tokens, which makes {sum(there.values())}; give more text, or ask "
            "for fewer or shorter windows"
        )
    starts = [(name, (index * there[name] // taken[name]) * length) for name in streams for index in range(taken[name])]
    return [streams[name][start : start + length] for name, start in starts]


def _stream(tokenizer: Any, documents: Sequence[Document], tokens: int) -> list[int]:
    """The text as token ids, so much of it that these tokens can be spread over it."""
    stream: list[int] = []
    for document in documents:
        stream += tokenizer.encode(document.text + "\n\n", add_special_tokens=False, verbose=False)
        if len(stream) >= MOST_TEXT * tokens:
            break
    return stream


def all_windows(tokenizer: Any, documents: Sequence[Document], length: int) -> list[list[int]]:
    """Every window of `length` token ids that the text makes, without overlap or BOS; what is left over is dropped."""
    stream: list[int] = []
    for document in documents:
        stream += tokenizer.encode(document.text + "\n\n", add_special_tokens=False, verbose=False)
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def text_digest(windows: Sequence[Sequence[int]]) -> str:
    """Names a text as a model reads it: 16 hexadecimal digits."""
    text = json.dumps([list(window) for window in windows], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
