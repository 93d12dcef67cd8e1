"""English text and code that every CPython ships, for calibration, search and reports without any file.

All of it depends on Python's version: `evaluator.texts.text_digest` tells two versions apart.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from evaluator.errors import TextError
from evaluator.texts import GROUPED_CHARACTERS, Document, paragraphs, passages, split

REPORT_CHARACTERS = 200_000  # enough report text
DOMAIN_CHARACTERS = 400_000  # enough text of a domain
NOT_EVERYWHERE = {  # parts of the standard library that distributions leave out or change
    *("distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtle", "turtledemo", "venv")
}


def documents() -> list[Document]:
    """Return English prose: the language reference in `pydoc_data.topics`, sorted by name.

    Topics quote each other at length. A paragraph stays only where it comes first, or the parts of a split would share
    text.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    prose = []
    for name in sorted(topics):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
        if kept:
            prose.append(Document(name, "\n\n".join(kept)))
    return prose


def report_documents() -> list[Document]:
    """Return about 200 kB of English prose for reports, which shares nothing with `documents`.

    It is the docstrings of the standard library's modules and of their classes, sorted by module: paragraphs of prose
    alone, each once. They are read from the sources, and nothing is imported.

    Raises:
        TextError: Python's sources are not installed.
    """
    return list(_report())


@functools.cache
def _report() -> tuple[Document, ...]:
    library = Path(sysconfig.get_path("stdlib"))
    seen = {passage for document in documents() for passage in passages(document.text)}
    found = []
    size = 0
    for name, file in _library_files(library):
        kept = []
        for paragraph in _docstring_paragraphs(file):
            held = set(passages(paragraph))
            if held and not held & seen and _is_prose(paragraph):
                seen |= held
                kept.append(paragraph)
        if kept:
            found.append(Document(name, "\n\n".join(kept)))
            size += len(found[-1].text)
        if size >= REPORT_CHARACTERS:
            break
    if not found:
        raise TextError(f"text: {library} holds no sources of the standard library; name .txt or .jsonl files instead")
    return tuple(found)


def domains() -> dict[str, list[Document]]:
    """Return text of several kinds to calibrate on, by domain; it shares nothing with the search and report texts.

    The domains are `topics` (the calibration part of `documents`), `docstrings` (of functions and methods) and `code`
    (sources without their docstrings).

    Raises:
        TextError: Python's sources are not installed.
    """
    return {name: list(each) for name, each in _domains().items()}


@functools.cache
def _domains() -> dict[str, tuple[Document, ...]]:
    topics, search = split(documents())
    seen = {passage for document in (*topics, *search, *_report()) for passage in passages(document.text)}
    found: dict[str, list[Document]] = {"docstrings": [], "code": []}
    sizes = dict.fromkeys(found, 0)
    for name, file in _library_files(Path(sysconfig.get_path("stdlib"))):
        for domain, candidates in zip(found, _function_docstrings_and_code(file), strict=True):
            kept = []
            for paragraph in candidates:
                held = set(passages(paragraph))
                if not held & seen:
                    seen |= held
                    kept.append(paragraph)
            if sum(map(len, kept)) >= GROUPED_CHARACTERS and sizes[domain] < DOMAIN_CHARACTERS:
                found[domain].append(Document(f"{domain}:{name}", "\n\n".join(kept)))
                sizes[domain] += len(found[domain][-1].text)
        if min(sizes.values()) >= DOMAIN_CHARACTERS:
            break
    return {"topics": tuple(topics), **{name: tuple(each) for name, each in found.items()}}


def _function_docstrings_and_code(file: Path) -> tuple[list[str], list[str]]:
    """Return the paragraphs of a source's function docstrings, and of its code without any docstring."""
    try:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):  # a damaged file is left out
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
            docstrings += [paragraph.strip("\n") for paragraph in paragraphs(docstring)]
    return docstrings, paragraphs("\n".join(line for line in lines if line is not None))


def _library_files(library: Path) -> Iterator[tuple[str, Path]]:
    """Yield (module, the path of its source), sorted by top-level module and path."""
    for name in sorted(sys.stdlib_module_names - NOT_EVERYWHERE):
        files = [library / f"{name}.py"] if (library / f"{name}.py").is_file() else (library / name).rglob("*.py")
        for file in sorted(files):
            parts = file.relative_to(library).with_suffix("").parts
            if not {"test", "tests"} & set(parts):
                yield ".".join(parts).removesuffix(".__init__"), file


def _docstring_paragraphs(file: Path) -> Iterator[str]:
    with contextlib.suppress(OSError, SyntaxError, ValueError):  # a damaged file is left out
        tree = ast.parse(file.read_bytes())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for docstring in (ast.get_docstring(tree), *map(ast.get_docstring, classes)):
            for paragraph in paragraphs(docstring or ""):
                yield paragraph.strip("\n")


def _is_prose(paragraph: str) -> bool:
    """Return whether a paragraph is sentences: mostly letters, a capital first, a full stop last, no interpreter."""
    flat = " ".join(paragraph.split())
    letters = sum(character.isalpha() or character == " " for character in flat)
    return flat[0].isupper() and flat[-1] in ".:!?" and letters >= 0.9 * len(flat) and ">>>" not in flat
