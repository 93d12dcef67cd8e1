import json

import pytest

from evaluator import texts
from evaluator.errors import TextError
from evaluator.texts import Document


class Words:
    """A tokenizer whose tokens are words."""

    def encode(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return [len(word) for word in text.split()]


def test_embedded_text_is_prose_in_a_fixed_order():
    documents = texts.embedded_documents()
    assert [d.name for d in documents] == sorted(d.name for d in documents)
    assert sum(len(d.text) for d in documents) > 200_000
    assert documents == texts.embedded_documents()


def test_the_parts_of_the_embedded_text_share_no_paragraph():
    calibration, search = texts.split(texts.embedded_documents())

    def paragraphs(documents):
        return {" ".join(p.split()) for d in documents for p in d.text.split("\n\n")}

    assert not paragraphs(calibration) & paragraphs(search)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.6, 0.9])
def test_split_holds_its_share_of_the_text(share):
    documents = [Document(str(i), "x" * (50 + 37 * i % 400)) for i in range(60)]
    calibration, search = texts.split(documents, share)
    assert sorted([*calibration, *search], key=lambda d: int(d.name)) == documents
    total = sum(len(d.text) for d in documents)
    assert abs(sum(len(d.text) for d in calibration) / total - share) < 0.03


def test_split_refuses_an_empty_part():
    with pytest.raises(TextError, match="leaves one part empty"):
        texts.split([], 1.0)


def test_windows_do_not_overlap_and_cover_the_text_evenly():
    documents = [Document("a", " ".join("x" * (i % 50 + 1) for i in range(100)))]
    windows = texts.windows(Words(), documents, length=10, count=3)
    stream = [i % 50 + 1 for i in range(100)]
    assert windows == [stream[0:10], stream[30:40], stream[60:70]]


def test_too_little_text_names_the_numbers():
    with pytest.raises(TextError, match="3 windows of 10 tokens were asked for, and 1 documents hold 25 tokens"):
        texts.windows(Words(), [Document("a", "x " * 25)], length=10, count=3)


def test_txt_paragraphs_are_grouped(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(f"paragraph {i} " + "x" * 900 for i in range(5)))
    documents = texts.read_documents([file])
    assert [d.name for d in documents] == ["a.txt:0", "a.txt:1"]
    assert documents[1].text.startswith("paragraph 3")


def test_jsonl(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two", "more": 1}) + "\n")
    assert [d.text for d in texts.read_documents([str(file)])] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"txt": 1}', "line 2"),
        ("a.jsonl", b"[]", "line 1"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.pdf", b"", ".pdf is not known"),
    ],
)
def test_unreadable_text(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=says) as raised:
        texts.read_documents([tmp_path / name])
    assert "\n" not in str(raised.value)


def test_missing_text(tmp_path):
    with pytest.raises(TextError, match="No such file"):
        texts.read_documents([tmp_path / "none.txt"])


def test_digest_tells_windows_apart():
    assert texts.text_digest([[1, 2], [3]]) != texts.text_digest([[1], [2, 3]])
    assert texts.text_digest([[1, 2]]) == texts.text_digest([(1, 2)])
