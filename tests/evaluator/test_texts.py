import json
import os
import sys
import time

import pytest
import transformers
from tokenizers import processors

from evaluator import texts
from evaluator.errors import TextError
from evaluator.texts import Document


class Words:
    """A tokenizer whose tokens are words."""

    bos_token_id = None

    def encode(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return [len(word) for word in text.split()]


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


def test_a_line_of_a_document_is_named_by_the_line_of_its_file(tmp_path):
    lines = ["", "", "one", "two", "", "  ", "", "", "three", "", "four " * 500, "five", "", "", "", "six", "seven", ""]
    file = tmp_path / "a.txt"
    file.write_text("\n".join(lines))
    documents = texts.read_documents([file])
    assert len(documents) == 2
    for document in documents:
        for number, line in enumerate(document.text.split("\n")):
            if line.strip():
                assert document.place(number) == f"a.txt:{lines.index(line) + 1}"
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"text": "one\\ntwo"}')
    assert texts.read_documents([file])[0].place(1) == "a.jsonl:2"


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_a_txt_file_gives_the_same_documents_whatever_ends_its_lines(tmp_path, end):
    file = tmp_path / "a.txt"
    text = "\n\n".join(f"paragraph {i}\n" + "x" * 900 for i in range(5)) + "\n\n\nthe end\n"
    file.write_text(text, encoding="utf-8", newline="")
    expected = texts.read_documents([file])
    assert len(expected) == 2
    file.write_text(text.replace("\n", end), encoding="utf-8", newline="")
    found = texts.read_documents([file])
    assert found == expected
    assert [document.lines for document in found] == [document.lines for document in expected]


def test_a_txt_file_of_many_megabytes_has_lines_whatever_ends_them(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluator.text_files.MOST_LINE", 100)
    file = tmp_path / "a.txt"
    file.write_bytes(b"\r".join([b"x" * 60] * 5))
    assert "".join(document.text for document in texts.read_documents([file])).count("x") == 300


def test_line_ends_in_a_jsonl_file_stay_what_they_were(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text":\r"one\\r\\n\\r\\ntwo"}\r\n\r\n{"text": "three"}\r\n')
    assert [d.text for d in texts.read_documents([file])] == ["one\r\n\r\ntwo", "three"]


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two", "more": 1}) + "\n")
    assert [d.text for d in texts.read_documents([str(file)])] == ["one", "two"]


def test_a_line_separator_inside_a_string_ends_no_document(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\u2028two"}\r\n{"text": "three"}', encoding="utf-8", newline="")
    assert [d.text for d in texts.read_documents([file])] == ["one\u2028two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"txt": 1}', "line 2"),
        ("a.jsonl", b"[]", "line 1"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.pdf", b"", ".pdf is not known"),
    ],
)
def test_unreadable_text_is_refused_by_name(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=says) as raised:
        texts.read_documents([tmp_path / name])
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(TextError, match="No such file"):
        texts.read_documents([tmp_path / "none.txt"])


def test_a_shorter_text_gives_what_it_has_where_that_is_enough():
    documents = [Document("a", " ".join("x" * (i % 50 + 1) for i in range(25)))]
    for asked, given in ((40, 2), (1, 1)):
        found = texts.windows(Words(), documents, 10, asked, or_fewer=True)
        assert found == texts.windows(Words(), documents, 10, given)
    with pytest.raises(TextError, match="40 windows of 50 tokens were asked for"):
        texts.windows(Words(), documents, 50, 40, or_fewer=True)


def test_digest_tells_windows_apart():
    assert texts.text_digest([[1, 2], [3]]) != texts.text_digest([[1], [2, 3]])
    assert texts.text_digest([[1, 2]]) == texts.text_digest([(1, 2)])


# -- datasets ------------------------------------------------------------------------------------------------


def test_a_dataset_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r"hub:ORG/NAME: .*pip install '\.\[hub\]'"):
        texts.read_documents(["hub:ORG/NAME"])


@pytest.mark.parametrize("name", ["hub:", "hub:a:b:c:d:e", "hub::config"])
def test_a_wrong_name_of_a_dataset_is_refused(name):
    with pytest.raises(TextError, match="no dataset's name"):
        texts.read_documents([name])


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hub:ORG/NAME", ("ORG/NAME", None, "train", "text")),
        ("hub:ORG/NAME:en", ("ORG/NAME", "en", "train", "text")),
        ("hub:ORG/NAME:en:test:content", ("ORG/NAME", "en", "test", "content")),
        ("hub:ORG/NAME::test", ("ORG/NAME", None, "test", "text")),
        ("hub:NAME:::content", ("NAME", None, "train", "content")),
    ],
)
def test_the_parts_of_a_datasets_name_are_told_apart(monkeypatch, name, asked):
    seen = []
    monkeypatch.setattr(
        texts,
        "dataset_documents",
        lambda name, *, config, split, column: seen.append((name, config, split, column)) or [],
    )
    texts.read_documents([name])
    assert seen == [asked]


@pytest.fixture
def dataset(tmp_path):
    """A directory with a dataset of 50 rows next to other files."""
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": "" if i % 5 == 0 else f"row {i} " + "x" * 500, "number": i} for i in range(50)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(json.dumps({"text": "one", "number": 3}) + "\n")
    return folder


def test_rows_of_a_dataset_are_grouped_and_limited(dataset):
    documents = texts.dataset_documents(str(dataset), limit=9)
    assert [d.name for d in documents] == [f"hub:{dataset}:train:{i}" for i in (1, 6, 11)]
    assert [d.text.split()[1] for d in documents] == ["1", "6", "11"]
    assert sum(d.text.count("row") for d in documents) == 9
    assert len(texts.read_documents([f"hub:{dataset}"])) == 10


def test_a_split_and_a_column_of_a_dataset_can_be_chosen(dataset):
    assert [d.text for d in texts.read_documents([f"hub:{dataset}::test:text"])] == ["one"]


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("::none", "Bad split: none. Available splits"),
        (":config", "'config' not found"),
        (":::words", "no column 'words'; its columns are text, number"),
        (":::number", "its 'number' is no text"),
    ],
)
def test_what_a_dataset_does_not_have_is_refused_by_name(dataset, rest, says):
    with pytest.raises(TextError, match=says) as raised:
        texts.read_documents([f"hub:{dataset}{rest}"])
    assert "\n" not in str(raised.value)


def test_a_dataset_is_streamed(dataset, monkeypatch):
    """Beyond the rows that are asked for nothing is read: what is damaged there is not seen."""
    row = json.dumps({"text": "x" * 300_000, "number": 1}) + "\n"
    (dataset / "train.jsonl").write_text(row * 100 + "damaged\n")  # 30 MB: three of its reader's blocks
    assert len(texts.dataset_documents(str(dataset), limit=3)) == 3
    with pytest.raises(TextError, match="can't be read"):
        texts.dataset_documents(str(dataset), limit=101)


def test_a_hub_that_cannot_be_reached_is_given_up_soon(monkeypatch):
    pytest.importorskip("datasets")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    with pytest.raises(TextError, match=r"hub:ORG/NAME: can't be read .*name \.txt or \.jsonl files, or a directory"):
        texts.read_documents(["hub:ORG/NAME"])
    assert time.monotonic() - started < 10


# -- files of the wrong kind ---------------------------------------------------------------------------------


def sparse(path):
    with path.open("wb") as file:
        file.truncate(7_000_000_000)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "can't be read: it is a FIFO, and only regular files are read; name .txt or .jsonl files"),
        (lambda path: path.symlink_to("/dev/zero"), "can't be read: it is a device"),
        (os.mkdir, "can't be read: it is a directory"),
        (sparse, "can't be read: it holds 7.0 GB, and at most 500.0 MB are read"),
        (lambda path: path.write_text("a" * 10_000_001), "line 1: holds 10,000,001 characters, and at most 10,000,000"),
        (lambda path: path.write_text("a\n" * 6_000_000 + "b" * 10_000_001 + "\nc"), "line 6000001: holds 10,000,001"),
        (lambda path: path.write_bytes(b"text \xff"), "can't be read: it is not UTF-8"),
    ],
)
def test_a_text_of_the_wrong_kind_is_refused_at_once(make, says, suffix, tmp_path):
    path = tmp_path / f"text{suffix}"
    make(path)
    with pytest.raises(TextError) as raised:
        texts.read_documents([path])
    assert says in str(raised.value)


def test_lines_that_are_nested_or_hold_half_a_character_are_refused_by_their_number(tmp_path):
    path = tmp_path / "text.jsonl"
    for line in ('{"text": "\\ud800"}', "[" * 100_000, '{"text": "a", "text": "b"}'):
        path.write_text('{"text": "a", "score": NaN}\n' + line)
        with pytest.raises(TextError, match="line 2: is not a JSON object"):
            texts.read_documents([path])


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("words", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "words"}', encoding="utf-8-sig")
    assert [one.text for one in texts.read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])] == ["words"] * 2


def test_a_paragraph_of_many_megabytes_becomes_documents_that_end_with_a_line(tmp_path):
    lines = [f"{number:0999}" for number in range(25_000)]  # 25 MB without a blank line
    (tmp_path / "text.txt").write_text("\n".join(lines))
    found = texts.read_documents([tmp_path / "text.txt"])
    assert len(found) == 3
    assert all(len(one.text) <= 10_000_000 for one in found)
    assert "\n".join(one.text for one in found).split("\n") == lines


# -- several texts -------------------------------------------------------------------------------------------


class Letters:
    """A token a letter."""

    bos_token_id = None

    def encode(self, text, **options):
        return [ord(letter) for letter in text]


@pytest.mark.parametrize("adds", [False, True])
def test_each_window_begins_as_the_tokenizer_begins_a_text(pico_llama, adds):
    """Gemma 3 and Llama 3 were never given a text without BOS; what has no such tokenizer is read as before."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(pico_llama)
    bos, documents = (
        tokenizer.bos_token_id,
        [Document("a", "The statement is executed in the current namespace. " * 20)],
    )
    every = texts.all_windows(tokenizer, documents, 12)
    if adds:
        template = processors.TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, bos)]
        )
        tokenizer.backend_tokenizer.post_processor = template
        plain, every = every, texts.all_windows(tokenizer, documents, 13)
        assert every == [[bos, *window] for window in plain]
    assert texts.windows(tokenizer, documents, len(every[0]), len(every)) == every
    assert [window[0] for window in every].count(bos) == (len(every) if adds else 0)


def test_several_texts_give_the_same_number_of_windows_except_where_one_is_short():
    domains = {"a": [Document("1", "a" * 400)], "b": [Document("2", "b" * 14)], "c": [Document("3", "c" * 400)]}
    found = texts.mixed_windows(Letters(), domains, 8, 9)
    assert [chr(window[0]) for window in found] == list("aaabbcccc")  # b makes two
    assert texts.mixed_windows(Letters(), domains, 8, 2) == [[ord("a")] * 8, [ord("c")] * 8]
    with pytest.raises(TextError, match="200 windows of 8 tokens"):
        texts.mixed_windows(Letters(), domains, 8, 200)


def test_texts_give_windows_by_their_weights_and_take_turns():
    domains = {name: [Document(name, name * 400)] for name in "abc"}
    weights = {"a": 1.0, "b": 4.0, "c": 1.0}

    def found(count, **options):
        return "".join(chr(window[0]) for window in texts.mixed_windows(Letters(), domains, 8, count, **options))

    assert found(6, weights=weights) == "abbbbc"
    assert found(6, weights=weights, in_turn=True) == "bbacbb"
    assert found(7, in_turn=True) == "cabcabc"
    domains["b"] = [Document("b", "b" * 14)]  # makes two windows
    assert found(9, weights=weights) == "aaabbcccc"
