"""The submission list, broken rule by rule, and the zip that is made when all of it holds."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressors import build
from compressors.errors import CheckpointError
from compressors.model import family
from compressors.model.checkpoint import Checkpoint
from compressors.model.transformers_version import DEFAULT, retarget
from compressors.plan import CompressionPlan
from search.by_hand import package, submission_rules
from search.errors import UsageError

ROOT = Path(__file__).parents[2]
RUNNING = transformers.__version__
NAMES = ["config.json", "weights", "tokenizer", "files", "size", "transformers_version", "form", "loads"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Pico models are slower on several threads, and much slower where other processes have the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(pico_exaone4, tmp_path_factory):
    """A compressed checkpoint as `compress` leaves it, notes included."""
    path = tmp_path_factory.mktemp("package") / "model_drop3"
    base = Checkpoint.read(pico_exaone4)
    plan = dataclasses.replace(CompressionPlan.identity(base.config), num_hidden_layers=3, drop_from="top")
    build.apply(plan, base, family.family_of(base), None).write(path)
    retarget(path, DEFAULT)
    for name in submission_rules.OWN:
        (path / name).write_text("{}")
    return path


@pytest.fixture
def model(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "model_drop3"))


def failed(path, **options):
    return {rule.name: rule.found for rule in submission_rules.check(path, **options) if not rule.ok}


def edit(model, name="config.json", **changes):
    values = json.loads((model / name).read_text()) | changes
    (model / name).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def rewrite(model, edit):
    """Write the weights again after `edit` has changed the dictionary of tensors."""
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"}
    )


def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.arange(3, 40)[None], use_cache=False).logits


def test_a_good_model_passes_and_is_packed(made, tmp_path):
    rules = submission_rules.check(made)
    assert [rule.name for rule in rules] == NAMES
    assert failed(made) == {}
    seen = []
    packed = package.pack(
        made, tmp_path / "new" / "submit.zip", progress=lambda done, total: seen.append((done, total)), checked=rules
    )
    assert packed.path == tmp_path / "new" / "submit.zip"
    assert packed.bytes == packed.path.stat().st_size
    assert packed.sha256 == hashlib.sha256(packed.path.read_bytes()).hexdigest()
    assert [path.name for path in packed.path.parent.iterdir()] == ["submit.zip"]
    total = sum(path.stat().st_size for path in made.iterdir() if path.name not in submission_rules.OWN)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)

    assert subprocess.run(["python3", "-m", "zipfile", "-t", packed.path], capture_output=True).returncode == 0
    with zipfile.ZipFile(packed.path) as archive:
        assert tuple(archive.namelist()) == packed.files
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o100644}
        archive.extractall(tmp_path / "there")
    assert packed.files == tuple(
        f"model/{name}"
        for name in (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    )
    assert torch.equal(logits(tmp_path / "there" / "model"), logits(made))
    assert json.loads(json.dumps(package.to_json(rules, packed)))["packed"]["files"] == list(packed.files)


def test_the_same_files_give_the_same_bytes(made, model, tmp_path):
    for index, path in enumerate(sorted(model.iterdir(), reverse=True)):
        os.utime(path, (1e9 + index, 1e9 + index))
        path.chmod(0o600)
    rules = submission_rules.check(made)
    one = package.pack(made, tmp_path / "a.zip", checked=rules)
    other = package.pack(model.rename(tmp_path / "another name"), tmp_path / "b.zip", checked=rules)
    assert one.path.read_bytes() == other.path.read_bytes()
    assert one.sha256 == other.sha256


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "W4A16"])
def test_an_8_bit_head_beside_any_scheme_is_no_fault(pico_llama, tmp_path, scheme):
    """A group of its own names it, after the group of all Linears, whose bits may be others."""
    base = Checkpoint.read(pico_llama)
    heads = {"num_key_value_heads": 2, "num_attention_heads": 4}
    plan = dataclasses.replace(CompressionPlan.identity(base.config), precision=scheme, lm_head="8-bit", **heads)
    build.apply(plan, base, family.family_of(base), None).write(tmp_path / "model")
    (found,) = (rule for rule in submission_rules.check(tmp_path / "model", target=None) if rule.name == "weights")
    assert found.ok
    assert "36 of them quantized" in found.found


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "W4A16"])
def test_tensors_of_a_quantized_model_must_fit_its_config(pico_llama, tmp_path, scheme):
    base = Checkpoint.read(pico_llama)
    plan = CompressionPlan.identity(base.config)
    plan = dataclasses.replace(plan, precision=scheme, num_key_value_heads=2, num_attention_heads=4)
    model = tmp_path / "model"
    build.apply(plan, base, family.family_of(base), None).write(model)
    retarget(model, DEFAULT)
    assert failed(model) == {}
    found = {rule.name: rule.found for rule in submission_rules.check(model)}
    assert "35 of them quantized" in found["weights"]

    module = "model.layers.3.mlp.up_proj"
    whole = load_file(model / "model.safetensors")
    rewrite(model, lambda tensors: tensors.pop(f"{module}.weight_scale"))
    assert f"{module}.weight_scale is missing" in failed(model)["weights"]
    save_file(whole, model / "model.safetensors", {"format": "pt"})

    def plain(tensors):
        for name in list(tensors):
            if name.startswith(f"{module}."):
                del tensors[name]
        tensors[f"{module}.weight"] = torch.zeros(160, 96, dtype=torch.bfloat16)

    rewrite(model, plain)
    assert f"{module} is unquantized, and config.json says that it is quantized" in failed(model)["weights"]
    save_file(whole, model / "model.safetensors", {"format": "pt"})
    part = "weight_packed" if scheme == "W4A16" else "weight"

    def narrow(tensors):
        tensors[f"{module}.{part}"] = tensors[f"{module}.{part}"][:, :-1]

    rewrite(model, narrow)
    assert f"{module}.{part} is 160 × " in failed(model)["weights"]
    save_file(whole, model / "model.safetensors", {"format": "pt"})
    none = whole[f"{module}.weight_scale"][:0].clone()
    rewrite(model, lambda tensors: tensors.update({f"{module}.weight_scale": none}))
    assert f"{module}.weight_scale is 0 × " in failed(model)["weights"]
    if scheme == "W4A16":
        for shape, said in ((torch.tensor(160), "a scalar"), (torch.tensor([[160, 96]]), "1 × 2")):
            save_file(whole | {f"{module}.weight_shape": shape}, model / "model.safetensors", {"format": "pt"})
            assert f"{module}.weight_shape is {said}, and not two numbers" in failed(model)["weights"]


def test_shards_must_be_those_of_the_index(model):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert failed(model) == {}
    packed = package.pack(model, model.parent / "s.zip")
    assert "model/model-00002-of-00002.safetensors" in packed.files
    assert "model/model.safetensors.index.json" in packed.files

    save_file({"x": torch.zeros(1)}, model / "model-00003-of-00003.safetensors")
    assert "model-00003-of-00003.safetensors does not belong there" in failed(model)["files"]
    (model / "model-00003-of-00003.safetensors").rename(model / "model.safetensors")
    assert "both model.safetensors and" in failed(model)["weights"]
    (model / "model.safetensors").unlink()
    (model / "model-00002-of-00002.safetensors").unlink()
    assert "the shard model-00002-of-00002.safetensors" in failed(model)["weights"]


# -- one rule broken at a time -------------------------------------------------------------------------------


def truncate(model):
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 100)


def drop_tensor(model):
    rewrite(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def add_tensor(model):
    rewrite(model, lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(160, 96)}))


def cut_tensor(model):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(model, lambda tensors: tensors.update({name: tensors[name][:, :90]}))


def untie(model):
    rewrite(model, lambda tensors: tensors.update({"lm_head.weight": torch.ones(320, 96)}))


def poison(model):
    rewrite(model, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))


def no_tokenizer(model):
    (model / "tokenizer.json").unlink()


def other_tokenizer(model):
    values = json.loads((model / "tokenizer.json").read_text())
    values["added_tokens"].append({**values["added_tokens"][0], "id": 320, "content": "[MORE]"})
    (model / "tokenizer.json").write_text(json.dumps(values))


BROKEN = {
    "missing tensor": (drop_tensor, "weights", "1 are missing, model.layers.1.mlp.up_proj.weight first"),
    "left-over tensor": (add_tensor, "weights", "they hold 4 layers, and config.json has num_hidden_layers: 3"),
    "wrong shape": (cut_tensor, "weights", "model.layers.1.mlp.up_proj.weight is 160 × 90"),
    "another head": (untie, "weights", "lm_head.weight is not the embedding"),
    "truncated": (truncate, "weights", "not a whole safetensors file"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "weights", "no model.safetensors"),
    "layers beyond reason": (
        lambda model: edit(model, num_hidden_layers=10**12, layer_types=..., sliding_window_pattern=4),
        "config.json",
        "num_hidden_layers: 1000000000000",
    ),
    "NaN": (poison, "loads", "not finite"),
    "no tokenizer": (no_tokenizer, "tokenizer", "there is none"),
    "broken tokenizer": (lambda model: (model / "tokenizer.json").write_text("{"), "tokenizer", "can't be read"),
    "another tokenizer": (other_tokenizer, "tokenizer", "its last token is 320, and the model has 320"),
    "pickle": (
        lambda model: (model / "old.bin").write_bytes(pickle.dumps({})),
        "files",
        "old.bin: pickles can run code",
    ),
    "stray": (lambda model: (model / "notes.txt").write_text(""), "files", "notes.txt does not belong there"),
    "code": (lambda model: (model / "modeling_x.py").write_text(""), "files", "modeling_x.py"),
    "hidden": (lambda model: (model / ".DS_Store").write_text(""), "files", ".DS_Store"),
    "folder": (lambda model: (model / "chat_template").mkdir(), "files", "chat_template"),
    "version": (lambda model: edit(model, transformers_version="5.23.0"), "transformers_version", "5.23.0, and 4.57.3"),
    "dtype": (lambda model: edit(model, dtype="bfloat16"), "form", "would misread config.json: dtype"),
    "head_dim": (lambda model: edit(model, head_dim=...), "form", "head_dim"),
    "rope": (
        lambda model: edit(
            model,
            rope_parameters={"rope_type": "default", "rope_theta": 5e3},
            rope_theta=...,
            rope_scaling=...,
        ),
        "form",
        "misread config.json: rope_theta",
    ),
    "tokenizer class": (
        lambda model: edit(model, "tokenizer_config.json", tokenizer_class="TokenizersBackend"),
        "form",
        "tokenizer_config.json: tokenizer_class",
    ),
    "config": (lambda model: (model / "config.json").write_text("{"), "config.json", "not a JSON object"),
    "no config": (lambda model: (model / "config.json").unlink(), "config.json", "is missing"),
    "refused config": (lambda model: edit(model, vocab_size="many"), "config.json", 'vocab_size: "many", which'),
    "config's numbers": (lambda model: edit(model, hidden_size="96"), "config.json", "hidden_size: '96'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named(model, name):
    breaks, rule, said = BROKEN[name]
    breaks(model)
    found = failed(model)
    assert said in found[rule]
    assert "\n" not in found[rule]
    allowed = {rule, "loads"} | ({"weights"} if name == "head_dim" else set())
    assert found.keys() <= allowed, found
    out = model.parent / "submit.zip"
    with pytest.raises(UsageError) as caught:
        package.pack(model, out)
    assert f"{rule}: " in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_what_is_larger_than_a_limit_is_refused(made, tmp_path):
    size = (made / "model.safetensors").stat().st_size / 1e6
    assert failed(made, max_model_mb=size) == {}
    assert "at most" in failed(made, max_model_mb=size - 0.001)["size"]
    rules = submission_rules.check(made)
    exact = package.pack(made, tmp_path / "a.zip", checked=rules).bytes / 1e6
    assert package.pack(made, tmp_path / "a.zip", checked=rules, max_zip_mb=exact).bytes == exact * 1e6
    before = (tmp_path / "a.zip").stat()
    for limit in (exact - 0.000001, size / 2):  # found out after it was written, and before
        with pytest.raises(UsageError, match="exceed the limit"):
            package.pack(made, tmp_path / "a.zip", checked=rules, max_zip_mb=limit)
        with pytest.raises(UsageError, match="exceed the limit"):
            package.pack(made, tmp_path / "not" / "there" / "b.zip", checked=rules, max_zip_mb=limit)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
    assert (tmp_path / "a.zip").stat().st_ino == before.st_ino


def test_without_a_target_no_version_is_asked_for(pico_exaone4):
    assert failed(pico_exaone4, target=None) == {}
    assert set(failed(pico_exaone4)) == {"transformers_version", "form"}
    assert set(failed(pico_exaone4, target="5.23.0")) <= {"transformers_version"}
    with pytest.raises(CheckpointError, match="known are"):
        submission_rules.check(pico_exaone4, target="3.1")


@pytest.mark.parametrize(
    ("described", "named", "asked", "study", "version"),
    [
        ({"for_transformers": "5.17.0"}, "5.17.0", None, None, "5.17.0"),
        ({"for_transformers": "5.17.0"}, "5.17.0", None, DEFAULT, "5.17.0"),
        ({"for_transformers": DEFAULT}, DEFAULT, None, "5.17.0", DEFAULT),
        ({"for_transformers": None}, "5.23.0", None, None, "5.23.0"),
        ({"for_transformers": None}, "5.23.0", None, DEFAULT, "5.23.0"),
        ({"for_transformers": None}, DEFAULT, None, None, DEFAULT),  # distilled from a model that was written for it
        ({"for_transformers": None}, "4.40.0", None, None, RUNNING),
        ({"for_transformers": None}, ..., None, None, RUNNING),
        ({"for_transformers": None}, 7, None, DEFAULT, RUNNING),
        ({"for_transformers": None}, "5.23.0", DEFAULT, None, DEFAULT),
        ({"for_transformers": DEFAULT}, DEFAULT, "5.17.0", "5.18.0", "5.17.0"),
        ({"for_transformers": ""}, "5.23.0", None, None, "5.23.0"),
        ({}, "5.23.0", None, None, DEFAULT),  # transformers writes its own version into every model
        ({}, "5.23.0", None, "5.17.0", "5.17.0"),
        (None, "5.23.0", None, None, DEFAULT),
        (None, DEFAULT, None, "5.17.0", "5.17.0"),
        ("damaged", "5.23.0", None, None, DEFAULT),
    ],
)
def test_a_model_is_checked_for_what_it_was_written_for(tmp_path, described, named, asked, study, version):
    (tmp_path / "config.json").write_text(json.dumps({} if named is ... else {"transformers_version": named}))
    if described is not None:
        (tmp_path / "compression.json").write_text("{" if described == "damaged" else json.dumps(described))
    target = submission_rules.target_of(tmp_path, asked, study)
    assert target.version == version
    assert str(target).startswith(f"checked for transformers {version}, ")
    assert (f"write it again with --for-transformers {DEFAULT}" in str(target)) == (version != DEFAULT)


def test_package_follows_what_a_model_was_written_for_and_says_so(cli, made, tmp_path):
    for name, version in (("now", None), ("server", DEFAULT), ("newer", "5.17.0")):
        path = tmp_path / "submit" / name
        shutil.copytree(made, path)
        retarget(path, version or RUNNING)
        (path / "compression.json").write_text(json.dumps({"for_transformers": version}))
        done = cli("package", "--model", f"submit/{name}", "--out", f"{name}.zip", cwd=tmp_path)
        assert done.status == 0, done.out + done.err
        assert done.out.startswith(
            f"submit/{name}: checked for transformers {version or RUNNING}, which it was written for"
        )
        assert f"✓ transformers_version: {version or RUNNING}\n" in done.out
        assert (tmp_path / f"{name}.zip").is_file()
    for words in (["--for-transformers", DEFAULT], [f"export.for_transformers={DEFAULT}"]):
        done = cli("package", "--model", "submit/now", "--check-only", *words, cwd=tmp_path)
        assert done.status == 1
        assert done.out.startswith(f"submit/now: checked for transformers {DEFAULT}, as you asked\n")
        assert f"✗ transformers_version: config.json says {RUNNING}" in done.out


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such directory"):
        submission_rules.check(tmp_path / "none")


# -- places that can't be written ----------------------------------------------------------------------------


@pytest.fixture
def rules(made):
    return [submission_rules.Rule(name, True, "") for name in NAMES]


def test_places_that_can_not_be_written_are_refused_and_left_alone(made, rules, tmp_path):
    (tmp_path / "file").write_text("")
    for out, said in (
        (tmp_path / "file" / "submit.zip", r"Not a directory|File exists"),
        (tmp_path, "is a directory"),
        (made / "submit.zip", "inside the model's directory"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            package.pack(made, out, checked=rules)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert not (made / "submit.zip").exists()


@contextlib.contextmanager
def mounted(place, options):
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no tmpfs here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_read_only_directory_is_refused(made, rules, tmp_path):
    with (
        mounted(tmp_path / "fixed", "ro,size=9m") as place,
        pytest.raises(UsageError, match="Read-only file system; nothing was changed"),
    ):
        package.pack(made, place / "submit.zip", checked=rules)


def test_ctrl_c_leaves_nothing(made, rules, tmp_path):
    def stop(done, total):
        assert any(path.name.startswith(".a.zip.package-") for path in (tmp_path / "new").iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        package.pack(made, tmp_path / "new" / "a.zip", checked=rules, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_deleted(made, rules, tmp_path):
    (tmp_path / ".a.zip.package-4194305").write_text("left by a process that is gone")
    (tmp_path / f".a.zip.package-{os.getppid()}").write_text("of one that lives")
    package.pack(made, tmp_path / "a.zip", checked=rules)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".a.zip.package-{os.getppid()}", "a.zip"]


def test_a_full_disk_leaves_nothing_half_written(made, rules, tmp_path):
    needed = sum(path.stat().st_size for path in made.iterdir())
    with mounted(tmp_path / "small", "size=1500k") as small:
        (small / "filler").write_bytes(b"x" * (1500 * 1024 - needed // 2))
        with pytest.raises(UsageError, match="free some"):
            package.pack(made, small / "submit.zip", checked=rules)

        def fill(done, total):  # someone else writes meanwhile
            (small / "more").write_bytes(b"x" * shutil.disk_usage(small).free)

        (small / "filler").unlink()
        with pytest.raises(UsageError, match="No space left on device; nothing was changed"):
            package.pack(made, small / "submit.zip", checked=rules, progress=fill)
        assert [path.name for path in small.iterdir()] == ["more"]


# -- create_submit.sh ----------------------------------------------------------------------------------------


def create_submit(home, *words, path="/usr/bin:/bin"):
    return subprocess.run(
        ["./create_submit.sh", *words], cwd=home, env={"PATH": path}, capture_output=True, text=True
    )  # fmt: skip


def say_words(path):
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\necho {path.parent.name}: "$@"\n')
    path.chmod(0o755)


def test_create_submit_finds_the_program_and_passes_its_words_on(tmp_path):
    shutil.copy(ROOT / "create_submit.sh", tmp_path)
    assert os.access(tmp_path / "create_submit.sh", os.X_OK)
    none = create_submit(tmp_path)
    assert none.returncode == 1
    assert "make setup" in none.stderr
    say_words(tmp_path / "elsewhere" / "optuna-search")
    path = f"{tmp_path / 'elsewhere'}:/usr/bin:/bin"
    assert create_submit(tmp_path, path=path).stdout == "elsewhere: package --model submit/model --out submit.zip\n"
    say_words(tmp_path / ".venv" / "bin" / "optuna-search")
    done = create_submit(tmp_path, "submit/model drop28", "a.zip", path=path)
    assert done.stdout == "bin: package --model submit/model drop28 --out a.zip\n"
    assert create_submit(tmp_path, "a", "b", "c").returncode == 2


@pytest.mark.parametrize("name", ["LICENSE", "chat_template.jinja", "vocab.txt", "tokenizer_config.json", "sub"])
def test_a_link_out_of_the_directory_is_not_packed(name, model, tmp_path):
    (tmp_path / "secret").write_text('{"a": "secret"}')
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../secret" if name != "sub" else "..")
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link that leads out"):
        submission_rules.check(model)
    with pytest.raises(CheckpointError, match="leads out"):
        package.pack(model, tmp_path / "submit.zip", checked=())
    assert not list(tmp_path.glob("*submit.zip*"))


def test_a_link_within_the_directory_is_packed_as_a_file(model, tmp_path):
    (model / "LICENSE.txt").write_text("a licence")
    (model / "LICENSE").symlink_to("LICENSE.txt")
    with zipfile.ZipFile(package.pack(model, tmp_path / "submit.zip").path) as archive:
        assert archive.read("model/LICENSE") == b"a licence"
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o100644}
