"""Test that what is compressed by hand is checked as a trial's checkpoint is: finite, and loadable; or not written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

STUDY = """
defaults: [_base, _self_]
study_name: hand
model: {{source: {model}}}
text: {{window: 32, calibration_windows: 4, shards: 4}}
evaluation: {{backend: transformers, device: cpu}}
export: {{for_transformers: 4.57.3}}
distillation: {{batch_tokens: 256}}
tracking: {{mlflow: false}}
"""
COMMANDS = {
    "cast": ("cast", "--dtype", "float16"),
    "drop-layers": ("drop-layers", "--keep-layers", "4", "--drop-from", "top"),
    "drop-layers by importance": ("drop-layers", "--keep-layers", "4"),
    "prune-heads": ("prune-heads", "--keep-kv-heads", "2"),
    "reduce-ffn": ("reduce-ffn", "--target-dim", "96", "--repair", "stream"),
    "reduce-hidden": ("reduce-hidden", "--target-dim", "72"),
    "quantize": ("quantize", "--scheme", "W8A8"),
    "quantize by gptq": ("quantize", "--scheme", "W8A8", "--quantizer", "gptq"),
    "distill": ("distill", "--student", "model", "--tokens", "256"),
}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def home(tmp_path, pico_llama):
    home = tmp_path / "home"
    (home / "studies").mkdir(parents=True)
    shutil.copytree(pico_llama, home / "model")
    (home / "studies" / "hand.yaml").write_text(STUDY.format(model=home / "model"))
    return home


def put(home, *values, name=UP):
    path = home / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[: len(values)] = torch.tensor(values, dtype=tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})


def edit(home, *dropped, **changes):
    path = home / "model" / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in dropped}))


def refused(cli, home, command):
    """Return the one line that a command ends with; nothing must be left where it writes."""
    (home / "made").mkdir(exist_ok=True)
    ended = cli("compress", *COMMANDS[command], "--study", "hand", "--save-path", "made/m", cwd=home)
    assert ended.status == 2, ended.err
    assert list((home / "made").iterdir()) == []
    said = [line for line in ended.err.splitlines() if line.startswith(("optuna-search: ", "Error: "))]
    assert len(said) == 1, ended.err
    return said[0]


SLOW = ("drop-layers by importance", "prune-heads", "reduce-hidden", "quantize")


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in COMMANDS if name != "distill"],
)
def test_a_base_model_with_nan_is_named_and_nothing_is_written(cli, home, command):
    put(home, float("nan"), float("inf"), 3.0)
    said = refused(cli, home, command)
    assert f"the base model's {UP} holds 1 NaN and 1 infinite among 15360 values; the largest finite mag" in said
    assert said.endswith("copy or download it again")


def test_a_student_with_nan_is_named_and_nothing_is_written(cli, home):
    shutil.copytree(home / "model", home / "teacher")
    put(home, float("nan"))
    study = (home / "studies" / "hand.yaml").read_text().replace(str(home / "model"), str(home / "teacher"))
    (home / "studies" / "hand.yaml").write_text(study)
    assert f"the student's {UP} holds 1 NaN" in refused(cli, home, "distill")


def test_a_cast_that_overflows_is_refused_and_one_that_fits_is_written(cli, home):
    put(home, 1e5, -7e4)
    said = refused(cli, home, "cast")
    assert f"{UP} has 2 of 15360 values beyond 65504, the largest number of float16, up to 99840" in said
    assert "choose bfloat16 or float32" in said
    words = ("compress", "cast", "--dtype", "float32", "--study", "hand", "--save-path", "made/m")
    assert cli(*words, cwd=home).status == 0
    assert load_file(home / "made" / "m" / "model.safetensors")[UP].isfinite().all()


def test_an_unknown_rope_type_is_refused(cli, home):
    edit(home, rope_parameters={"rope_type": "foo", "rope_theta": 1e4})
    assert "rope_type: foo in rope_parameters, which transformers doesn't know" in refused(cli, home, "cast")


def test_a_model_that_was_there_stays_when_its_replacement_is_refused(cli, home):
    words = ("compress", "cast", "--dtype", "float16", "--study", "hand", "--save-path", "m")
    assert cli(*words, cwd=home).status == 0
    before = {path.name: path.read_bytes() for path in (home / "m").iterdir()}
    put(home, float("nan"))
    assert cli(*words, cwd=home).status == 2
    assert {path.name: path.read_bytes() for path in (home / "m").iterdir()} == before
