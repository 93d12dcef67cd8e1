"""Distillation of a study's best trials: real models, a real study in SQLite, stock transformers on the CPU."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import transformers
from click.testing import CliRunner

from compressors.distillation import state as distill_state
from evaluator import checkpoint_files
from search import cli as commands
from search import finalists
from search.by_hand import distill, evaluate
from search.config import compose
from search.setup import keys, setting
from search.show.study_state import BestOfAll
from search.study import storage, workers

STUDY = """
defaults: [_base, _self_]
study_name: finals
trials: 4
model: {{source: {model}}}
space:
  num_hidden_layers: {{low: 3, high: 5}}
  precision: [bfloat16, W8A8]
  quantizer: [nearest, gptq]
text: {{window: 32, calibration: [{texts}/prose.txt], search: [{texts}/search.txt], report: null,
       calibration_windows: 4, moments_windows: 4, shards: 2, windows_per_shard: 8}}
evaluation: {{backend: transformers, device: cpu, speed: predicted}}
pruner: {{name: none}}
export: {{for_transformers: 4.57.3}}
distillation: {{batch_tokens: 256, learning_rate: 0.002, evaluate_every: 4096}}
tracking: {{mlflow: false}}
"""
TRIALS = [(5, "bfloat16", "nearest"), (3, "bfloat16", "nearest"), (3, "W8A8", "gptq"), (3, "W8A8", "nearest")]
FEW = ("text.calibration_windows=1", "text.windows_per_shard=1", "distillation.batch_tokens=400")
RUN = ("run", "--study", "finals")
DISTILL = (*RUN, "--distill-top", "3", "--tokens", "16384")
FIRST = (*RUN, "--distill-top", "1", "--tokens", "16384")


@pytest.fixture(scope="module")
def studied(tmp_path_factory, pico_llama):
    """A study of one uncut plan and three that differ in precision alone."""
    home = tmp_path_factory.mktemp("finals") / "home"
    (home / "studies").mkdir(parents=True)
    paragraphs = list(dict.fromkeys(" ".join(text.split()) for text in "\n\n".join(topics.values()).split("\n\n")))
    (home.parent / "prose.txt").write_text("\n\n".join(paragraphs)[:60_000])
    (home.parent / "search.txt").write_text("\n\n".join(paragraphs)[61_000:71_000])
    (home / "studies" / "finals.yaml").write_text(STUDY.format(model=pico_llama, texts=home.parent))
    file = compose.load("finals", config_dir=home / "studies")
    file = file.model_copy(update={"outputs": home / "outputs", "storage": f"sqlite:///{home}/outputs/studies.db"})
    study = storage.create_or_resume(
        storage.open_storage(file.storage), file.study_name, keys.definition(setting.prepare(file))
    )
    for layers, precision, quantizer in TRIALS:
        study.enqueue_trial({"num_hidden_layers": layers, "precision": precision, "quantizer": quantizer})
    workers.run_study(file)
    return home


@pytest.fixture
def home(studied, tmp_path):
    return Path(shutil.copytree(studied, tmp_path / "home"))


@pytest.fixture(scope="module")
def done(studied, tmp_path_factory):
    """The study's home with its finalists distilled, and what that printed."""
    home = Path(shutil.copytree(studied, tmp_path_factory.mktemp("done") / "home"))
    with contextlib.chdir(home):
        ended = CliRunner().invoke(commands.main, [*DISTILL, "--json"], catch_exceptions=False)
    assert ended.exit_code == 0, ended.stderr
    return home, json.loads(ended.stdout)


def stamps(home):
    places = (home / "submit", home / "outputs" / "distilled")
    return {path: path.stat().st_mtime_ns for place in places for path in place.rglob("*") if path.is_file()}


def test_finalists_are_distilled_quantized_and_measured(done):
    home, state = done
    rows = {row["trial"]: row for row in state["distilled"]}
    assert set(rows) == {1, 2, 3}
    names = [rows[number]["name"] for number in (1, 2, 3)]
    assert names == ["model_kd_drop3", "model_kd_drop3_w8a8_gptq", "model_kd_drop3_w8a8"]
    assert {path.name for path in (home / "submit").iterdir()} == set(names)
    scores = [row["after"]["score"] for row in state["distilled"]]
    assert scores == sorted(scores, reverse=True)
    (source,) = (home / "outputs" / "distilled").iterdir()  # one distillation for all three
    assert not list((home / "outputs" / "distillation").iterdir())
    assert len(list((home / "outputs" / "calibration").glob("moments-*"))) == 1  # the base model's alone
    for row in rows.values():
        path = home / row["path"]
        found = json.loads((path / "eval_result.json").read_text())
        assert found["score"] == row["after"]["score"]
        assert found["plan"] is None  # no plan alone made it
        assert found["measurement"]["weights_sha256"] == checkpoint_files.weights_sha256_of(path)
        assert row["after"]["kl_nats_per_token"] < 0.97 * row["before"]["kl_nats_per_token"]
        assert row["held_out_kl"][1] < row["held_out_kl"][0]
        assert row["tokens"] == 16384
        assert json.loads((path / "config.json").read_text())["transformers_version"] == "4.57.3"
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert model.config.num_hidden_layers == 3
    assert (home / rows[1]["path"] / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    quantized = [json.loads((home / rows[number]["path"] / "config.json").read_text()) for number in (2, 3)]
    assert [one["quantization_config"]["quant_method"] for one in quantized] == ["compressed-tensors"] * 2
    assert (
        len({checkpoint_files.weights_sha256_of(home / row["path"]) for row in rows.values()}) == 3
    )  # gptq is not nearest
    assert state["passed_over"] == []  # the uncut plan is not among the best three


def test_a_distilled_model_is_not_taken_for_its_undistilled_plan(done, monkeypatch):
    home, state = done
    monkeypatch.chdir(home)
    prepared = setting.prepare(compose.load("finals", config_dir=home / "studies"))
    for row in state["distilled"]:
        path = home / row["path"]
        assert evaluate.plan_in(path, checkpoint_files.weights_sha256_of(path), prepared) is None
        assert evaluate.known_evaluation(path, prepared).name == row["name"]


def test_a_second_call_does_nothing_again_and_status_shows_it(done, cli):
    home, state = done
    before = stamps(home)
    again = cli(*DISTILL, "--json", cwd=home)
    assert again.status == 0, again.err
    assert stamps(home) == before
    assert [row["reused"] for row in again.json["distilled"]] == [True] * 3
    plain = [{key: value for key, value in row.items() if key != "reused"} for row in state["distilled"]]
    shown = cli("status", "--study", "finals", "--json", cwd=home).json
    assert shown["distilled"] == plain
    assert shown["best_of_all"] == again.json["best_of_all"]
    table = cli("status", "--study", "finals", cwd=home).out
    for row in plain:
        (line,) = [line for line in table.splitlines() if f" {row['name']} " in line and "→" in line]
        assert f"{row['before']['score']:.4f}" in line
        assert f"{row['after']['score']:.4f}" in line


def test_the_best_of_all_is_named_with_the_command_that_packs_it(done, cli):
    home, state = done
    printed = cli(*DISTILL, cwd=home).out.splitlines()
    best, values = state["best_of_all"], [state["best"]["score"]]
    values += [row["after"]["score"] for row in state["distilled"]]
    assert best["score"] == max(values)
    (line,) = [line for line in printed if line.startswith("best of all: ")]
    assert f"{best['score']:.4f}" in line
    where = printed[printed.index(line) + 1 :]
    for command in (line.split() for line in where):
        assert command[0] == "optuna-search"
        ended = cli(*command[1:], cwd=home)
        assert ended.status == 0, ended.out + ended.err
    assert (home / "submit.zip").is_file()


def test_the_commands_that_pack_a_model_hide_a_password():
    words = ["--study", "finals", "storage=postgresql://bob:hunter2pw@db/x"]
    for winner in (BestOfAll(3, None, 0.6, 0.01), BestOfAll(3, "submit/model_kd_x", 0.6, 0.01)):
        lines = finalists.commands(winner, words, ["--storage", "postgresql://bob:hunter2pw@db/x"])
        assert len(lines) == (2 if winner.path is None else 1)
        assert all("storage=postgresql://" in line and "hunter2pw" not in line for line in lines)


@pytest.mark.long
def test_other_tokens_are_another_distillation_and_what_is_not_ours_stays(done, cli, tmp_path):
    home = Path(shutil.copytree(done[0], tmp_path / "home"))
    mine = home / "submit" / "model_kd_drop3"
    shutil.rmtree(mine)
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    shutil.copytree(mine, f"{mine}_trial1")
    before = stamps(home)
    ended = cli(*DISTILL, "--json", cwd=home)
    assert ended.status == 1
    *good, bad = ended.json["distilled"]
    assert [row["reused"] for row in good] == [True, True]
    assert bad["trial"] == 1
    assert "holds another model" in bad["reason"]
    assert "after" not in bad
    assert stamps(home) == before
    assert "holds another model" in cli("status", "--study", "finals", cwd=home).out
    shutil.rmtree(f"{mine}_trial1")
    other = cli(*RUN, "--distill-top", "9", "distillation.tokens=512", "--json", cwd=home)
    assert other.status == 0, other.err
    assert "--distill-top 9: the study has 3" in other.err
    assert "trial 0 is not distilled: base cuts nothing" in other.err
    (passed_over,) = other.json["passed_over"]
    assert passed_over["trial"] == 0
    assert "in bfloat16 there is nothing to win back" in passed_over["reason"]
    assert {row["tokens"] for row in other.json["distilled"]} == {512}
    assert [row["reused"] for row in other.json["distilled"]] == [False] * 3
    assert (mine / "notes.txt").read_text() == "mine"
    assert {row["name"] for row in other.json["distilled"]} >= {"model_kd_drop3_trial1"}


@pytest.mark.long
def test_a_size_limit_is_asked_of_what_is_made_and_not_of_what_is_distilled(done, cli, tmp_path):
    home, _ = done
    sizes = [
        (home / "submit" / name / "model.safetensors").stat().st_size
        for name in ("model_kd_drop3_w8a8", "model_kd_drop3")
    ]
    limit = sum(sizes) / 2
    assert sizes[0] < 0.9 * limit < 1.1 * limit < sizes[1]
    file = (home / "studies" / "finals.yaml").read_text()
    for was, becomes in (
        ("study_name: finals", "study_name: small"),
        ("{low: 3, high: 5}", "3"),
        ("[nearest, gptq]", "[nearest]"),
        ("tracking:", f"limits: {{max_size_mb: {limit / 1e6}}}\ntracking:"),
    ):
        assert was in file
        file = file.replace(was, becomes)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "small.yaml").write_text(file)
    ended = cli(
        "run", "--study", "small", "--trials", "2", "--distill-top", "1", "--tokens", "512", "--json", cwd=tmp_path
    )
    assert ended.status == 0, ended.err
    (row,) = ended.json["distilled"]
    assert row["name"] == "model_kd_drop3_w8a8"
    assert (tmp_path / row["path"] / "model.safetensors").stat().st_size <= limit
    (distilled,) = (tmp_path / "outputs" / "distilled").iterdir()
    assert (distilled / "model.safetensors").stat().st_size > limit
    (pruned,) = ended.json["ended"]
    assert "bfloat16" in str(pruned["plan"])
    assert "max_size_mb" in pruned["reason"]


@pytest.mark.long
def test_a_distillation_that_fails_has_its_reason_in_its_row(cli, home):
    (home / "outputs" / "distillation").write_text("no directory")
    ended = cli(*DISTILL, "--json", cwd=home)
    assert ended.status == 1
    assert [row["failure"] for row in ended.json["distilled"]] == ["CheckpointError"] * 3
    assert all("can't be made" in row["reason"] for row in ended.json["distilled"])
    assert ended.json["finished"] == 4
    assert ended.json["best_of_all"]["path"] is None
    assert not (home / "submit").exists()
    printed = cli(*DISTILL, cwd=home).out
    best = ended.json["best"]["trial"]
    assert f"optuna-search export --study finals --trial {best}" in printed  # the best of all is not a distilled one


@pytest.mark.long
def test_a_failure_takes_nothing_from_what_an_earlier_call_made(done, cli, tmp_path):
    home, state = Path(shutil.copytree(done[0], tmp_path / "home")), done[1]
    best, other, third = state["distilled"]
    (home / "outputs" / "distillation").rmdir()
    (home / "outputs" / "distillation").write_text("no directory")
    failing = (*DISTILL, "distillation.temperature=2.0", "--json")
    failed = cli(*failing, cwd=home)
    assert failed.status == 1
    assert [row["failure"] for row in failed.json["distilled"]] == ["CheckpointError"] * 3  # of this call
    assert failed.json["best_of_all"] == state["best_of_all"]
    assert f"the result that {best['path']} has from an earlier call stays" in failed.err
    shown = cli("status", "--study", "finals", "--json", cwd=home).json
    assert [row["after"] for row in shown["distilled"]] == [row["after"] for row in state["distilled"]]
    shutil.rmtree(home / best["path"])
    shown = cli("status", "--study", "finals", "--json", cwd=home).json["best_of_all"]
    assert (shown["trial"], shown["path"]) == (other["trial"], other["path"])
    shutil.copy(home / third["path"] / "model.safetensors", home / other["path"])  # another model than was measured
    assert cli(*failing, cwd=home).status == 1
    shown = cli("status", "--study", "finals", "--json", cwd=home).json
    assert [row["trial"] for row in shown["distilled"] if "after" in row] == [third["trial"]]
    assert {row["trial"] for row in shown["distilled"] if "failure" in row} == {best["trial"], other["trial"]}


def test_what_is_only_needed_on_the_way_is_deleted_however_a_call_ends(done, cli, tmp_path, monkeypatch):
    home = Path(shutil.copytree(done[0], tmp_path / "home"))
    shutil.rmtree(home / "submit")
    (first,) = [
        trial
        for trial in storage.load(storage.open_storage(f"sqlite:///{home}/outputs/studies.db"), "finals").trials
        if trial.number == 1
    ]
    student = home / "outputs" / "checkpoints" / first.user_attrs["checkpoint"]  # of what all three were distilled
    student.mkdir(exist_ok=True)  # left by a call that was killed when the distilled model was written
    write = distill.write

    def interrupted(*args):
        if args[-1]["plan"]["quantizer"] == "gptq":
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(distill, "write", interrupted)
    assert cli(*DISTILL, "limits.keep_checkpoints=1", cwd=home).status == 130
    assert len(list((home / "outputs" / "calibration").glob("moments-*"))) == 1  # the base model's alone
    assert not student.exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--tokens", "1000"], ["--tokens", "--distill-top"]),
        (["--distill-top", "0"], ["--distill-top", "x>=1"]),
        (["--distill-top", "1", "--tokens", "0"], ["--tokens", "x>=1"]),
        (["--distill-top", "1", "distillation.batch_tokens=8"], ["batch_tokens is 8", "window of 32"]),
        (["--distill-top", "1", "text.window=400", *FEW], ["windows of 400 tokens", "0 to judge on"]),
        (["--distill-top", "1", "export.for_transformers=3.0"], ["3.0"]),
        (["--distill-top", "1", 'goal={minimize: size, perf_norm: ">= 0.9"}'], ["minimize size", "repair: distill"]),
    ],
)
def test_wrong_usage_is_refused_before_the_study_runs(refused, studied, tmp_path, words, parts):
    (tmp_path / "studies").mkdir()
    file, prose = (studied / "studies" / "finals.yaml").read_text(), studied.parent / "prose.txt"
    short = tmp_path / "short.txt"
    short.write_text(prose.read_text()[:1500])
    (tmp_path / "studies" / "finals.yaml").write_text(file.replace(str(prose), str(short)))
    line = refused(*RUN, *words, cwd=tmp_path)
    for part in parts:
        assert part in line


KILLED = """
    import dataclasses, itertools, os, signal
    from compressors.distillation import state
    from search import cli
    from search.by_hand import distill

    calls, save, settings_of = itertools.count(1), state.save, distill.settings_of

    def dies(*args):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(*args)

    state.save = dies
    distill.settings_of = lambda *args: dataclasses.replace(settings_of(*args), save_every=0)
    cli.main()
"""


@pytest.mark.long
def test_a_killed_and_interrupted_call_is_resumed_to_the_same_result(done, cli, home, monkeypatch):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), *FIRST, "--json"],
        cwd=home, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (home / "submit").exists()
    (work,) = (home / "outputs" / "distillation").iterdir()
    steps = []
    load, save = distill_state.load, distill_state.save

    def watched(*args):
        found = load(*args)
        steps.append(found.step)
        return found

    def interrupted(*args):
        saved = save(*args)
        os.kill(os.getpid(), signal.SIGINT)
        return saved

    monkeypatch.setattr(distill_state, "load", watched)
    monkeypatch.setattr(distill_state, "save", interrupted)
    stopped = cli(*FIRST, "--json", cwd=home)
    assert stopped.status == 130
    assert stopped.out == ""
    assert "Traceback" not in stopped.err
    assert not (home / "submit").exists()
    assert not [path for path in (home / "outputs" / "checkpoints").iterdir() if path.name.startswith(".")]
    monkeypatch.setattr(distill_state, "save", save)
    ended = cli(*FIRST, "--json", cwd=home)
    assert ended.status == 0, ended.err
    assert steps == [32, 64]  # of 64 batches: it went on from the second saved state, and then from its end
    assert not work.exists()
    (row,) = ended.json["distilled"]
    (whole,) = [other for other in done[1]["distilled"] if other["trial"] == row["trial"]]
    assert {**row, "seconds": 0} == {**whole, "seconds": 0}
    weights = [place / row["path"] / "model.safetensors" for place in (home, done[0])]
    assert weights[0].read_bytes() == weights[1].read_bytes()
