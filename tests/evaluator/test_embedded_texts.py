import itertools
from pathlib import Path

import pytest

from evaluator import embedded_texts, shared_text, texts
from evaluator.errors import TextError
from evaluator.texts import Document


def test_the_text_is_prose_in_a_fixed_order():
    documents = embedded_texts.documents()
    assert [d.name for d in documents] == sorted(d.name for d in documents)
    assert sum(len(d.text) for d in documents) > 200_000
    assert documents == embedded_texts.documents()


def test_the_parts_of_the_embedded_text_share_no_paragraph():
    calibration, search = texts.split(embedded_texts.documents())

    def paragraphs(documents):
        return {" ".join(p.split()) for d in documents for p in d.text.split("\n\n")}

    assert not paragraphs(calibration) & paragraphs(search)


def test_the_parts_of_the_embedded_text_do_not_overlap():
    assert shared_text.compare(*texts.split(embedded_texts.documents())).characters == 0


def test_report_text_is_apart_from_both_halves():
    report = embedded_texts.report_documents()
    for half in texts.split(embedded_texts.documents()):
        assert shared_text.compare(half, report).characters == 0
    assert report == embedded_texts.report_documents()
    assert report[0].name == "__future__"
    assert {"argparse", "email.message", "xml.sax.handler"} <= {d.name for d in report}
    assert 100_000 < sum(len(d.text) for d in report) < 210_000
    paragraphs = [" ".join(p.split()).casefold() for d in report for p in d.text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(len(p) >= 80 and p[-1] in ".:!?" for p in paragraphs)


def test_report_text_leaves_out_what_a_topic_quotes(monkeypatch):
    """A topic that repeats a docstring's paragraph costs the report that paragraph and no other."""
    files = list(itertools.islice(embedded_texts._library_files(Path(embedded_texts.sysconfig.get_path("stdlib"))), 5))
    monkeypatch.setattr(embedded_texts, "_library_files", lambda library: files)
    collect = embedded_texts._report.__wrapped__
    before = collect()
    quoted = before[0].text.split("\n\n")[0]
    monkeypatch.setattr(embedded_texts, "documents", lambda: [Document("topic", f"  {quoted.upper()}\n\nmore")])
    after = collect()
    assert after[0].text == before[0].text.removeprefix(quoted).lstrip("\n")
    assert after[1:] == before[1:]


def test_python_without_sources_has_no_report_text(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded_texts.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(TextError, match="no sources of the standard library"):
        embedded_texts._report.__wrapped__()


@pytest.mark.long
def test_the_domains_share_no_passage_with_each_other_nor_with_what_judges():
    domains = embedded_texts.domains()
    assert list(domains) == ["topics", "docstrings", "code"]
    judges = [*texts.split(embedded_texts.documents())[1], *embedded_texts.report_documents()]
    for name, documents in domains.items():
        assert sum(len(document.text) for document in documents) > 200_000
        others = [document for other in domains if other != name for document in domains[other]]
        assert shared_text.compare(documents, [*judges, *others]).characters == 0
