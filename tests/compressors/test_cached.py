"""Test that damaged cached files of every kind are made again, once, and whole ones are not."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from compressors import cached
from compressors.model import cached_tensors
from compressors.typed_json import typed

GOOD = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)}
SHAPES = {name: (tensor.shape, tensor.dtype) for name, tensor in GOOD.items()}


def save(file, tensors, **metadata):
    file.unlink()
    save_file(tensors, file, metadata or None)


def replace(file, make):
    file.unlink()
    make(file)


TENSORS = {
    "another dtype": lambda file: save(file, {**GOOD, "a": GOOD["a"].half()}),
    "transposed": lambda file: save(file, {**GOOD, "a": GOOD["a"].T.contiguous()}),
    "a tensor less": lambda file: save(file, {"a": GOOD["a"]}),
    "a tensor more": lambda file: save(file, {**GOOD, "c": GOOD["b"].clone()}),
    "NaN in a file without digests": lambda file: save(file, {**GOOD, "a": GOOD["a"] * torch.nan}),
    "infinity in a file without digests": lambda file: save(file, {**GOOD, "a": GOOD["a"] / 0}),
    "other values": lambda file: save(file, GOOD, sha256=json.dumps({"a": "0" * 32})),
    "digests that are no JSON": lambda file: save(file, GOOD, sha256="{"),
    "digests that are a list": lambda file: save(file, GOOD, sha256="[1]"),
    "a device": lambda file: replace(file, lambda file: file.symlink_to("/dev/zero")),
    "a pipe": lambda file: replace(file, os.mkfifo),
    "a loop": lambda file: replace(file, lambda file: file.symlink_to(file)),
    "an empty directory": lambda file: replace(file, lambda file: file.mkdir()),
    "a header that is too long": lambda file: file.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "a header without contents": lambda file: file.write_bytes(struct.pack("<Q", 0)),
    "ten gigabytes of nothing": lambda file: os.truncate(file, 10**10),
    "a pickle": lambda file: torch.save(GOOD, file),
    "bytes at the end": lambda file: file.write_bytes(file.read_bytes() + bytes(9)),
}


def read_tensors(file):
    return cached_tensors.read_all(file, SHAPES)


def keep_tensors(file):
    cached_tensors.keep(file, GOOD, "test")


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_damaged_are_made_again(tmp_path, damages, what):
    file = tmp_path / "kept.safetensors"
    cached.kept(file, read_tensors, keep_tensors)
    TENSORS[what](file)
    tensors = cached.kept(file, read_tensors, keep_tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in GOOD.items())
    assert damages.told() == [file]
    cached.kept(file, read_tensors, lambda file: pytest.fail("it is whole"))


def test_tensors_of_earlier_versions_have_no_digests_and_are_used(tmp_path):
    save_file(GOOD, tmp_path / "kept")
    cached.kept(tmp_path / "kept", read_tensors, lambda file: pytest.fail("it is whole"))


TEXTS = (
    *("true", '"x"', "[]", "", "   ", "[" * 100_000, '{"a":' * 50_000, '\ufeff{"nll": [1]}', '{"nll": [1]}{}'),
    *('{"nll": [1]} //', '{"nll": [1e999]}', '{"nll": [Infinity]}', '{"nll": [NaN]}', '{"nll": [null]}'),
    *('{"nll": [[1]]}', '{"nll": {"0": 1}}', '{"nll": "1"}', '{"nll": [true]}', '{"nll": ["1"]}', '{"NLL": [1]}'),
    *('{"nll": [1, 2]}', '{"nll": []}', '{"nll": 1}', '{"nll": [1], "sha256": "0"}', '{"nll": [' + "9" * 5000 + "]}"),
)


def read_numbers(file):
    numbers = typed(tuple[float, ...], cached.read_json(file)["nll"], "nll")
    if len(numbers) != 1:
        raise ValueError(f"it has {len(numbers)} shards of 1")
    return numbers


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_numbers_that_are_damaged_are_made_again(tmp_path, damages, text):
    file = tmp_path / "kept.json"
    file.write_text(text)
    assert cached.kept(file, read_numbers, lambda file: cached.keep_json(file, {"nll": [0.5]})) == (0.5,)
    assert damages.told() == [file]


@pytest.mark.parametrize("text", ['{"nll": [1]}', '{"nll": [1.0], "of another version": 3}'])
def test_numbers_without_a_digest_are_used(tmp_path, text):
    file = tmp_path / "kept.json"
    file.write_text(text)
    assert cached.kept(file, read_numbers, lambda file: pytest.fail("it is whole")) == (1.0,)


def test_a_file_that_was_renamed_is_not_taken_for_another(tmp_path, damages):
    cached.keep_json(tmp_path / "one", {"a": 1})
    (tmp_path / "one").rename(tmp_path / "other")
    assert cached.known(tmp_path / "other", cached.read_json) is None
    assert damages.told() == [tmp_path / "other"]


def test_a_missing_file_is_made_without_a_word(tmp_path, damages):
    cached.kept(tmp_path / "new" / "kept", cached.read_json, lambda file: cached.keep_json(file, {"a": 1}))
    assert cached.known(tmp_path / "none", cached.read_json) is None
    assert damages.told() == []
