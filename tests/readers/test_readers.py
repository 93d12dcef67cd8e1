"""Test that files of the wrong kind, size, depth or encoding are refused with a reason, and at once."""

import os
import socket
import time
from pathlib import Path

import pytest

from readers import json_reader, regular, yaml_reader
from readers.errors import ReadError

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_sparse(path):
    with path.open("wb") as file:
        file.truncate(50_000_000_000)


@pytest.mark.parametrize("read", [json_reader.read, yaml_reader.read, lambda path: regular.read_text(path, 1000)])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_fifo, "it is a FIFO, and only regular files are read"),
        (make_socket, "it is a socket"),
        (Path.mkdir, "it is a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
        (lambda path: path.symlink_to(path), "a symbolic link that leads to no file"),
        (make_sparse, "it holds 50.0 GB, and at most"),
        (lambda path: path.write_bytes(b'{"a": "\xff"}'), "it is not UTF-8"),
        (lambda path: path.write_text("{}", encoding="utf-16"), "it is not UTF-8"),
    ],
)
def test_what_is_no_regular_utf8_file_of_some_size_is_refused_at_once(read, make, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    make(Path("file"))
    began = time.monotonic()
    with pytest.raises(ReadError) as caught:
        read(Path("file"))
    assert reason in str(caught.value)
    assert time.monotonic() - began < 5


def test_a_missing_file_is_an_oserror(tmp_path):
    for read in (json_reader.read, yaml_reader.read):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")
    with pytest.raises(ReadError, match="null byte"):
        json_reader.read(Path("a\0b"))


def test_a_file_without_a_size_is_read_up_to_the_limit():
    assert regular.read_text(Path("/proc/self/stat"), 100_000).startswith(f"{os.getpid()} ")
    with pytest.raises(ReadError, match="at most 5 bytes"):
        regular.read_text(Path("/proc/self/stat"), 5)


def test_a_link_is_followed_only_where_that_is_wanted(tmp_path):
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to("file")
    assert json_reader.read(tmp_path / "link") == {}
    with pytest.raises(ReadError, match="symbolic link"):
        json_reader.read(tmp_path / "link", follow=False)
    with pytest.raises(ReadError, match="symbolic link"):
        regular.copy(tmp_path / "link", tmp_path / "copied")
    assert not (tmp_path / "copied").exists()
    regular.copy(tmp_path / "file", tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "{}"


def test_a_byte_order_mark_is_skipped_where_it_does_no_harm(tmp_path):
    path = tmp_path / "file"
    path.write_text('{"a": 1}', encoding="utf-8-sig")
    assert json_reader.read(path) == yaml_reader.read(path) == {"a": 1}
    assert regular.read_text(path, 100) == '{"a": 1}'
    with pytest.raises(ReadError, match="byte order mark"):
        json_reader.read(path, mark=False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[" * 100_000, "nested more than 50 levels"),
        ("[" * 60 + "]" * 60, "nested more than 50 levels"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested more than 50 levels"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' twice, with different values"),
        ('[{"a": {"é": 1, "é": null}}]', r"the key '\xe9' twice"),
        ('{"a": NaN}', "the number nan"),
        ("[-Infinity]", "the number -inf"),
        ("[1e999]", "the number inf"),
        (r'{"a": "\ud800"}', "half of a surrogate pair"),
        (r'{"\udfff": 1}', "half of a surrogate pair"),
        ("9" * 5000, "Exceeds the limit"),
        ("{'a': 1}", "Expecting property name"),
        ('{"a": 1} {"b": 2}', "Extra data"),
    ],
)
def test_json_that_readers_would_stumble_over_is_refused_with_the_reason(text, reason):
    with pytest.raises(ReadError) as caught:
        json_reader.parse(text)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_json_within_the_limits_is_read():
    assert json_reader.parse("[" * 50 + "]" * 50)
    assert json_reader.parse('{"a": 1, "a": 1}') == {"a": 1}
    assert json_reader.parse("[Infinity]", finite=False) == [float("inf")]
    assert json_reader.parse(r'"\ud83d\ude00 한"') == "😀 한"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "more than 200,000 values, what its aliases repeat included"),
        ("a: &a [*a]", "alias *a is inside of what it repeats"),
        ("a: &a {b: {c: *a}}", "alias *a is inside of what it repeats"),
        ("a: *none", "undefined alias"),
        ("[" * 100_000, "nested more than 50 levels"),
        ("\n".join("  " * depth + "a:" for depth in range(60)), "nested more than 50 levels"),
        ("- " * 3000 + "a", "nested more than 50 levels"),
        ("a: 1\nb: 2\na: 3", "the key 'a' twice"),
        ("a: [", "not YAML of plain values"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML of plain values"),
        ("a: 1\n---\nb: 2", "not YAML of plain values"),
        ("a: 2001-99-99", "not YAML of plain values"),
        ("{a: 1}: 2", "not YAML of plain values"),
        ("a: \x07", "not YAML of plain values"),
        ("a: " + "9" * 5000, "not YAML of plain values"),
    ],
)
def test_yaml_that_would_fill_the_memory_or_is_no_plain_value_is_refused(text, reason):
    began = time.monotonic()
    with pytest.raises(ReadError) as caught:
        yaml_reader.parse(text)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 5


def test_yaml_within_the_limits_is_read():
    assert yaml_reader.parse("base: &base {x: 1}\none: {<<: *base, y: 2}\ntwo: [*base, *base]") == {
        "base": {"x": 1},
        "one": {"x": 1, "y": 2},
        "two": [{"x": 1}, {"x": 1}],
    }
    assert yaml_reader.parse("") is None
    assert len(yaml_reader.parse("".join(f"k{n}: {n}\n" for n in range(60_000)))) == 60_000
