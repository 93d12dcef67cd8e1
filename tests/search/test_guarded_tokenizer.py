"""Test that a tokenizer whose patterns or replacements blow up is refused within limits of time and memory."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from compressors.errors import CheckpointError
from search.setup import guarded_tokenizer
from search.setup.guarded_tokenizer import GuardedTokenizer
from search.setup.texts import tokenizer_of
from tests.waiting import AT_ONCE_S


@pytest.fixture
def model(pico_llama, tmp_path):
    return Path(shutil.copytree(pico_llama, tmp_path / "model"))


def edit(model, **changes):
    path = model / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split_by(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


BLOWING_UP = {
    "nested repeats": {"pre_tokenizer": split_by(r"(a+)+$")},
    "alternatives": {"pre_tokenizer": split_by(r"(\d+|\d\d)+$")},
    "doubling": {"normalizer": {"type": "Sequence", "normalizers": [replace("a", "aa")] * 40}},
    "a huge replacement": {"normalizer": {"type": "Sequence", "normalizers": [replace("a", "a" * 30_000)] * 2}},
}


@pytest.mark.long
@pytest.mark.parametrize("case", BLOWING_UP)
def test_a_tokenizer_that_blows_up_on_its_first_use_is_refused(case, model, monkeypatch):
    edit(model, **BLOWING_UP[case])
    monkeypatch.setattr(guarded_tokenizer, "ENCODE_S", 3.0)
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        tokenizer_of(model)
    assert f"model {model}: its tokenizer " in str(caught.value)
    assert "in its tokenizer.json " in str(caught.value)
    assert time.monotonic() - began < AT_ONCE_S


def test_one_that_blows_up_on_a_later_text_is_stopped_there(model, monkeypatch):
    edit(model, pre_tokenizer=split_by(r"(z+)+$"))
    tokenizer = tokenizer_of(model)
    assert tokenizer.encode("some words", add_special_tokens=False)
    monkeypatch.setattr(guarded_tokenizer, "ENCODE_S", 2.0)  # only now: a busy machine may take longer for any text
    with pytest.raises(CheckpointError, match=r"its tokenizer (took more than 2 s|failed) for"):
        tokenizer.encode("z" * 5000 + "!", add_special_tokens=False)


def test_a_pattern_that_is_not_known_but_quick_changes_nothing(pico_llama, model):
    plain = tokenizer_of(pico_llama)
    assert not isinstance(plain, GuardedTokenizer)
    own = json.loads((model / "tokenizer.json").read_text())["pre_tokenizer"]
    edit(model, pre_tokenizer={"type": "Sequence", "pretokenizers": [split_by(r"\n\n+"), own]})
    guarded = tokenizer_of(model)
    assert isinstance(guarded, GuardedTokenizer)
    text = "one paragraph, 한국어\n\nand another"
    assert plain.decode(guarded.encode(text, add_special_tokens=False)) == text
    assert guarded.encode("a b", add_special_tokens=False) == plain.encode("a b", add_special_tokens=False)
    assert guarded.bos_token_id == plain.bos_token_id
    assert guarded.get_vocab() == plain.get_vocab()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 5000, "can't be read"),
        (b"\xff", "it is not UTF-8"),
        (b"[]", "it has no model"),
        (b"{", "can't be read"),
    ],
)
def test_a_tokenizer_json_of_the_wrong_kind_is_refused(content, says, model):
    (model / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        tokenizer_of(model)
    assert says in str(caught.value)


def test_a_tokenizer_json_of_many_gigabytes_is_refused(model):
    with (model / "tokenizer.json").open("wb") as file:
        file.truncate(5_000_000_000)
    with pytest.raises(CheckpointError, match=r"at most 256\.0 MB are read"):
        guarded_tokenizer.doubt_of(model, model / "tokenizer.json")


def test_the_child_ends_with_its_tokenizer(model):
    edit(model, pre_tokenizer=split_by("[0-9]"))
    tokenizer = tokenizer_of(model)
    child = tokenizer._trial._child.pid
    assert Path(f"/proc/{child}").exists()
    del tokenizer
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
