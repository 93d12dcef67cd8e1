"""Test that nothing outside a model's directory is read or copied through symbolic links."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from compressors.errors import CheckpointError
from compressors.model import checkpoint, model_directory, structure
from compressors.model.checkpoint import Checkpoint

SECRET = "the secret of this machine"


@pytest.fixture
def model(pico_llama, tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text(SECRET)
    return Path(shutil.copytree(pico_llama, tmp_path / "model"))


def relink(path, target):
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


def chain(model):
    relink(model / "b", "c")
    relink(model / "c", "../secret")
    relink(model / "LICENSE", "b")


def through_a_directory(model):
    relink(model / "inner", "../elsewhere")
    relink(model / "LICENSE", "inner/secret")


def up_from_below(model):
    (model / "sub").mkdir()
    relink(model / "LICENSE", "sub/../../secret")


def moved_weights(model):
    (model / "model.safetensors").rename(model.parent / "weights")
    relink(model / "model.safetensors", "../weights")


def almost_a_hub_cache(model):
    """A link to a file next to the directory `blobs`, which looks like a blob."""
    (model.parent / "blobs").mkdir()
    relink(model / "LICENSE", "../blobs/../secret")


LEADING_OUT = {
    "LICENSE": lambda model: relink(model / "LICENSE", "../secret"),
    "absolute": lambda model: relink(model / "chat_template.jinja", model.parent / "secret"),
    "vocab.txt": lambda model: relink(model / "vocab.txt", "../secret"),
    "tokenizer.model": lambda model: relink(model / "tokenizer.model", "/etc/passwd"),
    "tokenizer.json": lambda model: relink(model / "tokenizer.json", "../secret"),
    "config.json": lambda model: relink(model / "config.json", "../secret"),
    "generation_config.json": lambda model: relink(model / "generation_config.json", "../secret"),
    "weights": moved_weights,
    "chain": chain,
    "through a directory": through_a_directory,
    "up from below": up_from_below,
    "nested": lambda model: relink(model / "additional_chat_templates" / "tool.jinja", "../../secret"),
    "a directory": lambda model: relink(model / "additional_chat_templates", "../elsewhere"),
    "the root": lambda model: relink(model / "everything", "/"),
    "its parent": lambda model: relink(model / "up", ".."),
    "/proc": lambda model: relink(model / "LICENSE", "/proc/self/environ"),
    "/proc/self/root": lambda model: relink(model / "LICENSE", f"/proc/self/root{model.parent / 'secret'}"),
    "/dev/zero": lambda model: relink(model / "LICENSE", "/dev/zero"),
    "a name that begins alike": lambda model: (
        (model.parent / "model-2").mkdir(),
        (model.parent / "model-2" / "secret").write_text(SECRET),
        relink(model / "LICENSE", "../model-2/secret"),
    ),
    "hidden": lambda model: relink(model / ".license", "../secret"),
    "almost a hub cache": almost_a_hub_cache,
}


@pytest.mark.parametrize("case", LEADING_OUT)
def test_a_link_out_of_the_directory_is_refused_for_every_reader(case, model):
    LEADING_OUT[case](model)
    for read in (Checkpoint.read, structure.describe_any, checkpoint.stamp_of):
        with pytest.raises(CheckpointError) as caught:
            read(model)
        assert "is a symbolic link that leads out of the model's directory (" in str(caught.value)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda model: relink(model / "LICENSE", "nothing"), "LICENSE is a symbolic link that leads nowhere (nothing)"),
        (lambda model: relink(model / "LICENSE", "LICENSE"), "LICENSE is a symbolic link that leads nowhere (LICENSE)"),
        (lambda model: relink(model / "LICENSE", "/proc/self/fd/99"), "leads nowhere"),
        (lambda model: os.mkfifo(model / "chat_template.jinja"), "chat_template.jinja is a FIFO; a model's directory"),
        (lambda model: (os.mkfifo(model / "pipe"), relink(model / "LICENSE", "pipe")), "is a FIFO"),
        (lambda model: (model / "merges.txt").mkdir(), "merges.txt is a directory; put the file in its place"),
    ],
)
def test_links_that_lead_nowhere_and_special_files_are_refused(make, says, model):
    make(model)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.read(model)
    assert says in str(caught.value)


def test_a_carried_file_of_many_gigabytes_is_refused(model):
    with (model / "LICENSE").open("wb") as file:
        file.truncate(20_000_000_000)
    with pytest.raises(CheckpointError, match=r"LICENSE holds 20\.0 GB, and at most 1\.0 GB of a file are copied"):
        Checkpoint.read(model)


def test_links_within_the_directory_and_to_it_are_followed(model, tmp_path):
    (model / "LICENSE.txt").write_text("a licence")
    relink(model / "LICENSE", "LICENSE.txt")
    relink(model / "circle", ".")
    (tmp_path / "named").symlink_to("model")
    Checkpoint.read(tmp_path / "named").write(tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "a licence"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_the_cache_of_the_hub_is_read_and_copied(pico_llama, tmp_path):
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in pico_llama.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, cache / "blobs" / digest)
        relink(snapshot / file.name, f"../../blobs/{digest}")
    Checkpoint.read(snapshot).write(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (pico_llama / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert structure.describe_any(snapshot).uncuttable is None
    with pytest.raises(CheckpointError, match="leads out"):
        model_directory.files_of(snapshot, hub_cache=False)

    (tmp_path / "secret").write_text(SECRET)
    relink(cache / "blobs" / ("a" * 40), "../../secret")  # a blob that is a link itself
    for target in (f"../../blobs/{'a' * 40}", "../../secret", "../../../secret"):
        relink(snapshot / "LICENSE", target)
        (cache / "secret").write_text(SECRET)
        with pytest.raises(CheckpointError, match="leads out"):
            Checkpoint.read(snapshot)


def test_a_link_that_replaces_a_file_after_the_check_is_not_followed(model, tmp_path):
    (model / "LICENSE").write_text("a licence")
    read = Checkpoint.read(model)
    relink(model / "LICENSE", "../secret")
    with pytest.raises(CheckpointError, match="nothing was changed there"):
        read.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_outside_the_directory_are_refused(model):
    (model / "model.safetensors").rename(model.parent / "model.safetensors")
    index = model / "model.safetensors.index.json"
    for name in ("../model.safetensors", str(model.parent / "model.safetensors"), "sub/model.safetensors"):
        index.write_text(f'{{"weight_map": {{"model.norm.weight": "{name}"}}}}')
        with pytest.raises(CheckpointError, match="which is not directly in the model's directory"):
            Checkpoint.read(model)
