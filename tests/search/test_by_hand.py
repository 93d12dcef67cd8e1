"""The manual workflow: every command line of docs/by-hand.md, and what its steps promise."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from compressors.plan import CHOICES, OPTIONS, CompressionPlan, name_of
from evaluator import embedded_texts
from search.by_hand import evaluate, multirun
from search.config import compose
from search.setup import setting
from search.study import workers

ROOT = Path(__file__).parents[2]

STUDY = """
defaults: [_base, _self_]
study_name: hand
model: {{source: {model}}}
text: {{calibration: embedded, window: 32, calibration_windows: 4, shards: 4}}
evaluation:
  backend: transformers
  device: cpu
  workload: {{prompt_tokens: 8, decode_steps: 4, turns: 4}}
export: {{for_transformers: 4.57.3}}
distillation: {{batch_tokens: 256, learning_rate: 0.001}}
tracking: {{mlflow: false}}
"""
SMALLER = {"1536": "72", "3584": "128", "2000000": "512"}  # the documentation's numbers are for EXAONE


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory, write_pico_model):
    """As many layers and heads as EXAONE-4.0-1.2B, and next to nothing in them."""
    return write_pico_model(
        tmp_path_factory.mktemp("deep") / "model",
        "exaone4",
        num_hidden_layers=30,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=8,
    )


def make_home(home, model):
    (home / "studies").mkdir(parents=True)
    (home / "studies" / "hand.yaml").write_text(STUDY.format(model=model))
    return home


@pytest.fixture(scope="module")
def shared(tmp_path_factory, pico_llama):
    """A home whose baseline stays known from test to test."""
    return make_home(tmp_path_factory.mktemp("hand"), pico_llama)


@pytest.fixture
def home(tmp_path, pico_llama):
    model = tmp_path / "model"
    shutil.copytree(pico_llama, model)
    return make_home(tmp_path / "home", model)


def documented():
    """Our command lines, in the order of the table."""
    table = (ROOT / "docs" / "by-hand.md").read_text()
    rows = [line.split("|")[3] for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    return [line for row in rows for line in re.findall(r"`([^`]+)`", row)]


@pytest.mark.long
def test_every_command_line_of_the_workflow_works(cli, tmp_path, deep_model, monkeypatch):
    home = make_home(tmp_path / "home", deep_model)
    study = (home / "studies" / "hand.yaml").read_text().replace("tracking: {mlflow: false}", "")
    study = study.replace("evaluation:", "evaluation:\n  speed: predicted")  # the other tests take the time
    (home / "studies" / "hand.yaml").write_text(study)
    for name in ("Makefile", "create_submit.sh", ".env.example", "pyproject.toml"):
        shutil.copy(ROOT / name, home)
    shim = tmp_path / "bin" / "optuna-search"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m search.cli "$@"\n')
    shim.chmod(0o755)
    monkeypatch.setenv("OPTUNA_SEARCH_STUDY", "hand")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    shutil.copytree(deep_model, home / "submit" / "model_drop28")  # the report is of one that somebody made elsewhere
    assert cli("evaluate", "--model", "submit/model_drop28", cwd=home).status == 0

    lines = documented()
    assert len(lines) >= 25
    for line in lines:
        words = shlex.split(line)
        if words[0] == "optuna-search":
            words = [SMALLER.get(word, word) for word in words[1:]]
            ended = cli(*words, cwd=home)
            assert ended.status == 0, (line, ended.err)
        elif words[0] == "make":
            for command in make(home, *words[1:]):
                if command[0].endswith("optuna-search"):
                    ended = cli(*command[1:], cwd=home)
                    assert ended.status == 0, (line, ended.err)
        elif words[0] == "./create_submit.sh":
            done = subprocess.run(words, cwd=home, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif words[0] == "cp":
            subprocess.run(words, cwd=home, check=True)
            (home / ".env").unlink()  # its placeholders are no server
        else:
            assert words == ["mlflow", "ui"]

    written = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert {"outputs/baseline_result.json", "submit.zip", "submit/model/eval_result.json", "structure.png"} <= written
    assert any(re.fullmatch(r"outputs/\d{4}-\d\d-\d\d_drop28/\d{4}-\d\d-\d\d_report\.md", name) for name in written)
    for layers in (22, 24, 26, 28):
        made = json.loads((home / "submit" / f"model_drop{layers}" / "config.json").read_text())
        assert made["num_hidden_layers"] == layers
    assert tracked(home) >= {"baseline", "drop_layers_26", "drop22", "drop24", "drop26", "drop28"}


def make(home, *words):
    """The command lines that make would run, without the set-up."""
    (home / ".venv").mkdir(exist_ok=True)
    (home / ".venv" / ".ready-demo+dev").touch()
    done = subprocess.run(["make", "-n", *words], cwd=home, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.splitlines() if line.strip() and not line.startswith("echo")]


def tracked(home):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    found = client.get_experiment_by_name("optuna-search")
    runs = client.search_runs([found.experiment_id])
    for run in runs:
        assert {"number_of_layers", "number_of_heads", "hidden_dim", "total_parameters", "model_size_mb"} <= set(
            run.data.params
        )
        assert {"tokens_per_sec", "time_per_token_ms", "perplexity", "perf_norm", "speed_norm", "score"} <= set(
            run.data.metrics
        )
        assert ("baseline" in run.data.tags) == (run.info.run_name == "baseline")
    return {run.info.run_name for run in runs}


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bfloat16", "W8A8"])
def test_a_plan_by_hand_is_measured_as_the_study_measures_it(cli, shared, precision):
    overrides = [f"space={{num_hidden_layers: 3, intermediate_size: 128, precision: [{precision}]}}", "trials=1"]
    file = compose.load("hand", [*overrides, f"study_name={precision}"], shared / "studies")
    file = file.model_copy(update={"outputs": shared / "outputs", "storage": f"sqlite:///{shared}/outputs/studies.db"})
    trial = workers.run_study(file).best_trial
    keys = ["compression.keep_layers=3", "compression.intermediate_size=128"]
    keys += ["compression.scheme=W8A8"] if precision == "W8A8" else []
    done = cli("compress", "--study", "hand", *keys, "--save-path", f"submit/{precision}", "--evaluate", cwd=shared)
    assert done.status == 0, done.err
    mine = json.loads((shared / "submit" / precision / "eval_result.json").read_text())
    theirs = json.loads((shared / "outputs" / "measurements" / f"{trial.user_attrs['measurement']}.json").read_text())
    assert mine["plan"] == trial.user_attrs["plan"]
    for key in ("perplexity", "shard_nll", "kl_nats_per_token", "top1_agreement", "weights_sha256", "logits_sha256"):
        assert mine["measurement"][key] == theirs[key], key
    assert mine["perf_norm"] == trial.user_attrs["perf_norm"]
    baseline = json.loads((shared / "outputs" / "baseline_result.json").read_text())
    assert mine["baseline"].items() <= baseline.items()


@pytest.mark.long
def test_a_multirun_compares_and_a_second_call_skips_what_is_done(cli, shared):
    words = ("compress", "--study", "hand", "-m", "compression.keep_layers=range(2,4)", "tracking=off")
    first = cli(*words, "--json", cwd=shared)
    assert first.status == 0, first.err
    rows = first.json
    assert [row["name"] for row in rows] == ["drop2", "drop3"]
    assert [row["before"] for row in rows] == [False, False]
    assert [row["plan"]["num_hidden_layers"] for row in rows] == [2, 3]
    stamps = {path: path.stat().st_mtime_ns for path in (shared / "submit").rglob("*")}
    second = cli(*words, "--json", cwd=shared)
    assert [row["before"] for row in second.json] == [True, True]
    assert {path: path.stat().st_mtime_ns for path in (shared / "submit").rglob("*")} == stamps
    # another workload: built before, measured again
    third = cli(*words, "evaluation.workload.turns=5", "--json", cwd=shared)
    assert [row["before"] for row in third.json] == [False, False]
    table = cli("report", cwd=shared).out.splitlines()
    scores = [float(re.findall(r"(-?\d\.\d{4})±", line)[-1]) for line in table if "±" in line]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) >= 3


def test_a_model_that_is_converted_first_is_not_replaced_either(cli, tmp_path, pico_llama):
    """Its directory is not the one that is read, which lies in the cache."""
    home = make_home(tmp_path / "home", pico_llama)
    shutil.copytree(pico_llama, home / "odd")
    config = json.loads((home / "odd" / "config.json").read_text())
    config = {**{key: value for key, value in config.items() if key != "dtype"}, "torch_dtype": "torch.bfloat16"}
    (home / "odd" / "config.json").write_text(json.dumps(config))
    words = ("compress", "cast", "--dtype", "float16", "--study", "hand", "--model", "odd", "--save-path")
    found = cli(*words, "odd", cwd=home)
    assert found.status == 2
    assert "is the model that is read, and would be lost" in found.err
    assert json.loads((home / "odd" / "config.json").read_text()) == config
    assert cli(*words, "smollm2-135m", cwd=home).status == 0  # the name of a model elsewhere is a directory like others


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(cli, tmp_path, pico_llama):
    home = make_home(tmp_path / "home", pico_llama)
    shutil.copytree(pico_llama, tmp_path / "disk" / "model")
    (home / "submit").mkdir()
    (home / "submit" / "model").symlink_to(tmp_path / "disk" / "model")
    done = cli("compress", "cast", "--dtype", "float16", "--study", "hand", "--save-path", "submit/model", cwd=home)
    assert done.status == 0, done.err
    assert (home / "submit" / "model").is_symlink()
    assert json.loads((tmp_path / "disk" / "model" / "config.json").read_text())["torch_dtype"] == "float16"
    assert [path.name for path in (home / "submit").iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_the_model_that_is_compressed_is_not_replaced(cli, tmp_path, pico_llama):
    home = make_home(tmp_path / "home", pico_llama)
    shutil.copytree(pico_llama, home / "submit" / "model")
    before = (home / "submit" / "model" / "config.json").read_bytes()
    found = cli("compress", "cast", "--dtype", "float16", "--study", "hand", "--model", "submit/model", cwd=home)
    assert found.status == 2
    assert "is the model that is read, and would be lost" in found.err
    assert (home / "submit" / "model" / "config.json").read_bytes() == before


@pytest.mark.long
def test_jobs_of_a_multirun_are_called_by_their_experiments(tmp_path, pico_llama, monkeypatch):
    home = make_home(tmp_path / "home", pico_llama)
    (home / "studies" / "experiments").mkdir()
    for name, cut in (("one", "keep_layers: 3"), ("two", "keep_layers: 3, scheme: W8A8")):
        said = f"# @package _global_\nexperiment_name: my_{name}\ncompression: {{{cut}}}\n"
        (home / "studies" / "experiments" / f"01-01_{name}.yaml").write_text(said)
    monkeypatch.chdir(home)

    def names(*words):
        each = [(compose.load("hand", one, None), one) for one in compose.sweep(list(words), None)]
        for save_path, place in ((None, "submit"), (Path("m/foo"), "m")):
            planned = multirun.plan_jobs(each, save_path, print, engine=False, multirun=True)
            assert [job.path for job in planned] == [Path(place, f"model_{job.name}") for job in planned]
        return [job.name for job in planned]

    assert names("experiments=one,two") == ["my_one", "my_two"]
    assert names("experiments=one,two", "compression.drop_from=top") == ["my_one", "my_two"]
    assert names("compression.keep_layers=3") == ["drop3"]
    # one experiment of several jobs names none of them
    assert names("experiments=one", "compression.keep_layers=3,4") == ["drop3", "drop4"]
    assert names("experiments=one,two", "text.window=32,64") == [
        f"{plan}_window-{window}" for plan in ("drop3", "drop3_w8a8") for window in (32, 64)
    ]


def test_plans_that_differ_have_names_that_differ():
    base = CompressionPlan(30, 32, 8, 2048, 4096, "bfloat16")
    cut = dataclasses.replace(base, num_hidden_layers=28, precision="W4A16")
    assert name_of(cut, base) == "drop28_w4a16"
    named = {name_of(cut, base)}
    for option in OPTIONS:
        named |= {
            name_of(dataclasses.replace(cut, **{option: choice}), base)
            for choice in (CHOICES[option].values or (0, 1, 4))[1:]
        }
    words = {
        "energy",
        "flap",
        "obs",
        "kl",
        "smoothquant",
        "pca",
        "ridge",
        "stream",
        "distill",
        "mse",
        "gptq",
        "g32",
        "g64",
        "g128",
        "lmhead8",
        "kvfp8",
        "keep1",
        "keep4",
    }
    assert named == {"drop28_w4a16"} | {f"drop28_w4a16_{word}" for word in words}
    both = dataclasses.replace(cut, drop_from="top", precision="W8A8", repair="stream", quantizer="gptq")
    assert name_of(both, base) == "drop28-top_w8a8_stream_gptq"


@pytest.mark.long
def test_a_job_that_can_not_be_built_says_so_in_its_row_and_the_others_go_on(cli, shared):
    done = cli("compress", "--study", "hand", "-m", "compression.keep_heads=4,3", "--json", cwd=shared)
    assert done.status == 1
    bad, good = done.json
    assert "4 query heads" in bad["reason"]
    assert good["plan"]["num_attention_heads"] == 3


@pytest.mark.long
def test_a_stale_baseline_is_measured_again_and_says_why(cli, home):
    first = cli("baseline", "--study", "hand", "--json", cwd=home)
    assert first.status == 0, first.err
    again = cli("baseline", "--study", "hand", "--json", cwd=home)
    assert again.json == first.json  # known
    assert "again" not in again.err
    other = cli("baseline", "--study", "hand", "evaluation.workload.turns=5", "--json", cwd=home)
    assert "measured again" in other.err
    assert "'turns': 4" in other.err
    weights = home.parent / "model" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, weights, metadata={"format": "pt"})
    changed = cli("baseline", "--study", "hand", "--json", cwd=home)
    assert "measured again: model was" in changed.err
    assert changed.json["perplexity"] != first.json["perplexity"]


@pytest.mark.long
def test_a_checkpoint_of_another_origin_is_measured_without_a_plan(cli, shared, pico_llama, tmp_path):
    """Fine-tuned elsewhere, saved by stock transformers in two shards: no plan is known of it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(0.5)
    path = tmp_path / "tuned"
    model.save_pretrained(path, max_shard_size="300KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    for file in Path(pico_llama).glob("tokenizer*"):
        shutil.copy(file, path)
    done = cli("evaluate", "--study", "hand", "--model", path, "--run-name", "tuned", "--json", cwd=shared)
    assert done.status == 0, done.err
    found = done.json
    assert found["plan"] is None
    assert found["measurement"]["kl_nats_per_token"] > 1e-3
    base = transformers.AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.float32)
    file = compose.load("hand", config_dir=shared / "studies")
    kl = []
    for shard in setting.prepare(file).texts.shards:
        for window in shard:
            with torch.no_grad():
                p, q = (m(torch.tensor([window])).logits[0, :-1].log_softmax(-1) for m in (base, model))
            kl.append((p.exp() * (p - q)).sum(-1).mean().item())
    assert found["measurement"]["kl_nats_per_token"] == pytest.approx(sum(kl) / len(kl), rel=1e-2)
    assert found["report_text"]["perf_norm"] == pytest.approx(
        found["report_text"]["base_perplexity"] / found["report_text"]["perplexity"]
    )
    unconfirmed = file.model_copy(update={"text": file.text.model_copy(update={"report": None})})
    with contextlib.chdir(shared):
        known = [evaluate.known_evaluation(path, setting.prepare(one)) for one in (file, unconfirmed)]
    assert [evaluation and evaluation.to_dict() for evaluation in known] == [found, None]  # other text: measured again


@pytest.mark.long
def test_weights_that_were_changed_since_are_not_taken_for_the_plans(cli, shared):
    path = shared / "submit" / "changed"
    compress = ("compress", "drop-layers", "--study", "hand", "--keep-layers", "4", "--save-path", path)
    assert cli(*compress, cwd=shared).status == 0
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2:] = b"\x80\x3f"
    weights.write_bytes(data)
    done = cli("evaluate", "--study", "hand", "--model", path, "--json", cwd=shared)
    assert done.json["plan"] is None


@pytest.mark.long
def test_a_quantized_checkpoint_of_another_origin_has_its_plans_quality(cli, shared):
    """What compressed-tensors multiplies out is what the screen of its plan computes."""
    path = shared / "submit" / "w8a8"
    quantize = ("compress", "quantize", "--study", "hand", "--scheme", "W8A8", "--save-path", path)
    done = cli(*quantize, "--evaluate", "--json", "space=smollm2-135m", cwd=shared)  # by hand a space says nothing
    assert done.status == 0, done.err
    (row,) = done.json
    (path / "compression.json").unlink()
    found = cli("evaluate", "--study", "hand", "--model", path, "--json", cwd=shared).json
    assert found["plan"] is None
    assert found["measurement"]["perplexity"] == row["perplexity"]
    assert found["measurement"]["kl_nats_per_token"] == pytest.approx(row["kl_nats_per_token"], rel=0.05)


@pytest.mark.slow
def test_a_cut_model_learns_from_the_original(cli, shared):
    cut = ("compress", "drop-layers", "--study", "hand", "--keep-layers", "4", "--drop-from", "top")
    assert cli(*cut, "--save-path", "submit/model_drop4", cwd=shared).status == 0
    prose = shared / "prose.txt"
    prose.write_text("\n\n".join(document.text for document in embedded_texts.domains()["topics"])[:40_000])
    learn = ("compress", "distill", "--study", "hand", "--student", "submit/model_drop4", "--tokens", "32768", "--json")
    done = cli(*learn, "distillation.evaluate_every=8192", f"text.calibration=[{prose}]", cwd=shared)
    assert done.status == 0, done.err
    assert done.json["path"] == "submit/model_kd_drop4"
    assert done.json["kl_best"] < done.json["kl_before"]
    assert not list((shared / "outputs" / "distillation").iterdir())  # its state goes when the model is written
    scores = {}
    for name in ("model_drop4", "model_kd_drop4"):
        found = cli("evaluate", "--study", "hand", "--model", f"submit/{name}", "--json", cwd=shared)
        assert found.status == 0, found.err
        scores[name] = found.json["measurement"]["kl_nats_per_token"]
    assert scores["model_kd_drop4"] < scores["model_drop4"]  # on text that neither saw


@pytest.mark.long
def test_options_reach_the_plan(cli, shared):
    words = ("--importance", "obs", "--repair", "ridge", "text.moments_windows=2")
    done = cli("compress", "reduce-ffn", "--study", "hand", "--target-dim", "128", *words, "--json",
               "--save-path", "submit/repaired", cwd=shared)  # fmt: skip
    assert done.status == 0, done.err
    plan = json.loads((shared / "submit" / "repaired" / "compression.json").read_text())["plan"]
    assert (plan["importance"], plan["repair"]) == ("obs", "ridge")
    words = ("--quantizer", "gptq", "--group-size", "32", "--keep-16-bit", "2", "text.moments_windows=2")
    done = cli("compress", "quantize", "--study", "hand", "--scheme", "W4A16", *words, "compression.keep_heads=4",
               "compression.keep_kv_heads=2", "compression.method=[quantize,prune_heads]", "--json",
               "--save-path", "submit/gptq", cwd=shared)  # fmt: skip
    assert done.status == 0, done.err
    config = json.loads((shared / "submit" / "gptq" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert len(config["ignore"]) > 1
    found = cli("evaluate", "--study", "hand", "--model", "submit/gptq", "text.moments_windows=2", "--json", cwd=shared)
    assert found.status == 0, found.err


@pytest.mark.long
def test_a_report_says_what_was_measured_and_how_to_do_it_again(cli, shared):
    path = shared / "submit" / "reported"
    words = ("compress", "--study", "hand", "compression.keep_layers=4", "compression.drop_from=[1]")
    assert cli(*words, "--save-path", path, "--evaluate", cwd=shared).status == 0
    found = json.loads((path / "eval_result.json").read_text())
    printed = cli("report", "-e", "less", "-m", path, "-d", "one layer removed", "--print-only", cwd=shared).out
    assert "one layer removed" in printed
    assert f"= {found['score']:.4f}" in printed
    assert f"{found['perf_norm']:.4f} ± {found['perf_norm_se']:.4f}" in printed
    assert not list((shared / "outputs").glob("*_less"))
    done = cli("report", "-e", "less", "-m", path, "--json", cwd=shared)
    written = shared / done.json["report"]
    page = written.with_suffix(".html").read_text()
    assert f"= {found['score']:.4f}" in page
    assert "<table>" in page
    assert {"shards.png", "scores.png"} <= {file.name for file in written.parent.iterdir()}
    commands = [shlex.split(line) for line in written.read_text().splitlines() if line.startswith("optuna-search ")]
    shutil.rmtree(path)
    for command in commands:  # it reproduces itself
        assert cli(*command[1:], cwd=shared).status == 0
    again = json.loads((path / "eval_result.json").read_text())
    assert again["measurement"]["weights_sha256"] == found["measurement"]["weights_sha256"]
    assert again["perf_norm"] == found["perf_norm"]


def test_perf_of_several_parts_is_their_weighted_mean(cli, shared, tmp_path):
    questions = tmp_path / "questions.jsonl"
    lines = [{"question": f"The {n} of", "choices": ["the", "zzz qqq"], "answer": n % 2} for n in range(6)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    perf = f"evaluation.perf=[{{metric: perplexity}},{{metric: multiple_choice,files: [{questions}],weight: 3}}]"
    words = ("compress", "--study", "hand", "compression.keep_layers=4", perf, "--evaluate", "--json")
    done = cli(*words, "--save-path", "submit/tasks", cwd=shared)
    assert done.status == 0, done.err
    found = json.loads((shared / "submit" / "tasks" / "eval_result.json").read_text())
    task = found["measurement"]["tasks"]["questions"]
    base = found["baseline"]["tasks"]["questions"]
    ratio = found["baseline"]["perplexity"] / found["measurement"]["perplexity"]
    assert found["perf_norm"] == pytest.approx((ratio + 3 * task["value"] / base["value"]) / 4)


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["compression.keep_layer=4"], ["compression.keep_layer", "did you mean 'keep_layers'"]),
        (["compression.keep_layers=6"], ["num_hidden_layers", "6", "5"]),
        (["compression.keep_layers=0"], ["compression.keep_layers", "greater than or equal to 1"]),
        (["compression.keep_heads=4"], ["4 query heads"]),
        (["compression.drop_from=[7]"], ["drop_from", "7"]),
        (["compression.drop_from=middle", "compression.keep_layers=3"], ["'middle'", "importance"]),
        (["compression.scheme=W9A8"], ["'W9A8'", "did you mean 'W8A8'"]),
        (["compression.scheme=W8A8", "compression.dtype=float16"], ["quantized or cast, not both"]),
        (["compression.hidden_size=97"], ["hidden_size", "97"]),
        (["experiments=02-05_drop-layer"], ["no such file", "did you mean '02-05_drop-layers-26'"]),
        (["experiments=drop"], ["could be"]),
        (["experiments=broken"], ["studies/experiments/broken.yaml", "keep_layer", "did you mean 'keep_layers'"]),
        ([], ["nothing to do"]),
        (["compression.keep_layers=2,3"], ["multirun"]),
        (["model=mini"], ["model=mini", "smollm2-135m"]),
    ],
)
def test_bad_words_are_refused_with_what_to_do(refused, home, words, parts):
    experiments = home / "studies" / "experiments"
    experiments.mkdir()
    (experiments / "broken.yaml").write_text("# @package _global_\ncompression: {keep_layer: 3}\n")
    line = refused("compress", "by-config", "--study", "hand", *words, cwd=home)
    for part in parts:
        assert part in line


def test_bad_models_are_refused(refused, home):
    model = home.parent / "model"
    compress = ("compress", "drop-layers", "--keep-layers", "4", "--study", "hand")
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    assert "not a whole safetensors file" in refused(*compress, cwd=home)
    weights.unlink()
    assert "no weights" in refused(*compress, cwd=home)
    (model / "pytorch_model.bin").write_bytes(whole)
    assert "pickled weights" in refused(*compress, cwd=home)
    assert "no such directory" in refused(*compress, "--model", "elsewhere", cwd=home)
    (home / "empty").mkdir()
    for words in (("evaluate", "--study", "hand"), ("report", "-e", "x")):
        assert "no such directory" in refused(*words, "--model", "nowhere", cwd=home) or words[0] == "evaluate"
    assert "eval_result.json" in refused("report", "-e", "x", "-m", "empty", cwd=home)


def test_a_place_that_holds_something_else_is_not_overwritten(refused, home):
    (home / "mine").mkdir()
    (home / "mine" / "notes.txt").write_text("mine")
    compress = ("compress", "drop-layers", "--keep-layers", "4", "--study", "hand", "--save-path")
    assert "no model" in refused(*compress, "mine", cwd=home)
    assert "is a file" in refused(*compress, "mine/notes.txt", cwd=home)
    assert "mine/notes.txt is a file" in refused(*compress, "mine/notes.txt/deeper", cwd=home)


def test_a_full_disk_leaves_nothing_half_written(cli, home, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs here")
    try:
        words = ("compress", "drop-layers", "--keep-layers", "4", "--drop-from", "top", "--study", "hand")
        ended = cli(*words, "--save-path", small / "model", cwd=home)
        assert ended.status == 2
        assert "disk" in ended.err
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_model_with_another_tokenizer_is_refused(refused, cli, shared, tmp_path):
    path = tmp_path / "other"
    assert cli(
        "compress", "drop-layers", "--keep-layers", "4", "--study", "hand", "--save-path", path, cwd=shared
    ).status == 0  # fmt: skip
    (path / "compression.json").unlink()
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-20]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its tokenizer reads text otherwise" in refused("evaluate", "--study", "hand", "--model", path, cwd=shared)
