"""The texts that a study shares: read once, cut once, apart from each other, and named by the digests of plans."""

import collections
import dataclasses
from pathlib import Path

import pytest

from evaluator import texts
from search import config, setting
from search.errors import UsageError


def prose(start, count):
    return "\n\n".join(
        f"Paragraph {number} of the text that a test has made itself says {number * number % 9973} and no word more."
        for number in range(start, start + count)
    )


@pytest.fixture
def prepared(tmp_path, pico_llama):
    (tmp_path / "fit.txt").write_text(prose(0, 120))
    (tmp_path / "search.txt").write_text(prose(1000, 80))

    def prepare(**text):
        values = {
            "study_name": "texts",
            "outputs": str(tmp_path / "outputs"),
            "model": {"source": str(pico_llama)},
            "evaluation": {"backend": "transformers", "device": "cpu"},
            "text": {
                "window": 32,
                "calibration_windows": 1,
                "moments_windows": 4,
                "shards": 2,
                "calibration": [str(tmp_path / "fit.txt")],
                "search": [str(tmp_path / "search.txt")],
                **text,
            },
        }
        return setting.prepare(config.validate(values, "this test"))

    return prepare


@pytest.fixture
def read(monkeypatch):
    """How often each file was read."""
    counts = collections.Counter()
    read_documents = texts.read_documents

    def counted(paths):
        counts.update(Path(path).name for path in paths)
        return read_documents(paths)

    monkeypatch.setattr(texts, "read_documents", counted)
    return counts


def test_a_text_is_read_once_until_it_changes(prepared, read, tmp_path):
    (tmp_path / "report.txt").write_text(prose(2000, 80))
    whole = prepared(report=[str(tmp_path / "report.txt")])
    assert len(setting.report_shards(whole)) == 2
    first = setting.calibration_documents(whole.file)
    assert read == {"fit.txt": 1, "search.txt": 1, "report.txt": 1}
    (tmp_path / "fit.txt").write_text(prose(100, 121))
    assert setting.calibration_documents(whole.file) != first
    assert read["fit.txt"] == 2


def test_moments_are_of_the_text_that_was_there_when_the_study_began(prepared, tmp_path, monkeypatch):
    first = prepared()
    plan = dataclasses.replace(first.identity, intermediate_size=128)
    repaired = dataclasses.replace(plan, repair="ridge")
    cut = collections.Counter()
    windows = texts.windows
    monkeypatch.setattr(texts, "windows", lambda *args: cut.update(["cut"]) or windows(*args))
    monkeypatch.setattr(setting, "tokenizer_of", None)  # there is one already
    plain = first.plan_digest(plan)
    assert not cut  # no moments are needed, and no text for them
    digest = first.plan_digest(repaired)
    (tmp_path / "fit.txt").write_text(prose(0, 20) + "\n\n" + prose(500, 100))
    with_moments = dataclasses.replace(first, threads=1).moments_for(repaired)
    assert with_moments.windows() == first.moments_text.windows
    assert first.plan_digest(repaired) == digest
    assert cut == {"cut": 1}
    monkeypatch.undo()
    second = prepared()  # the text beyond the one calibration window is another
    assert second.calibration_windows == first.calibration_windows
    assert second.plan_digest(plan) == plain
    assert second.plan_digest(repaired) != digest
    assert second.moments_for(repaired).path != with_moments.path


@pytest.mark.parametrize("domain", ["topics", "docstrings", "code"])
def test_a_report_of_what_the_calibration_holds_is_refused(prepared, tmp_path, domain):
    document = setting._embedded_domains()[domain][0]
    (tmp_path / "report.txt").write_text(prose(2000, 80) + "\n\n" + document.text)
    whole = prepared(calibration="embedded", report=[str(tmp_path / "report.txt")])
    with pytest.raises(UsageError, match=r"text\.calibration and text\.report share text"):
        setting.report_shards(whole)


@pytest.mark.parametrize("part", ["calibration", "search"])
def test_text_is_shared_neither_with_the_search_nor_with_the_report(prepared, tmp_path, part):
    (tmp_path / "other.txt").write_text(prose(70 if part == "calibration" else 1070, 80))
    whole = prepared(report=[str(tmp_path / "other.txt")])
    with pytest.raises(UsageError, match=rf"text\.{part} and text\.report share text"):
        setting.report_shards(whole)
    if part == "calibration":
        with pytest.raises(UsageError, match=r"text\.calibration and text\.search share text"):
            prepared(search=[str(tmp_path / "other.txt")])
