"""Tests of the command line: outputs, exit statuses and error messages."""

import contextlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import AT_ONCE_S, until

STUDY = """
defaults: [_base, _self_]
study_name: small
trials: 5
outputs: {home}/outputs
storage: sqlite:///{home}/outputs/studies.db
model: {{source: {model}}}
space:
  num_hidden_layers: {{low: 2, high: {layers}}}
  num_key_value_heads: {{low: 1, high: {kv}}}
text: {{window: 32, calibration_windows: 4, shards: 6}}
evaluation:
  backend: transformers
  device: cpu
  workload: {{prompt_tokens: 8, decode_steps: 4, turns: 4}}
tracking: {{mlflow: false}}
"""


def optuna_search(*words, cwd, timeout=300):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "search.cli", *map(str, words)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def make_home(home, model):
    config = json.loads((Path(model) / "config.json").read_text())
    text = STUDY.format(home=home, model=model, layers=config["num_hidden_layers"], kv=config["num_key_value_heads"])
    (home / "studies").mkdir(parents=True)
    (home / "studies" / "small.yaml").write_text(text)
    return home


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pico_llama):
    """Return the home of a finished study, which tests only read."""
    home = make_home(tmp_path_factory.mktemp("cli"), pico_llama)
    done = optuna_search("run", "--study", "small", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    return home, json.loads(done.stdout)


@pytest.fixture
def home(tmp_path, pico_llama):
    model = tmp_path / "model"
    shutil.copytree(pico_llama, model)
    return make_home(tmp_path / "home", model)


@pytest.fixture
def run_refused(refused):
    return lambda home, *words: refused("run", "--study", "small", *words, cwd=home)


def test_run_measures_prunes_and_reports(finished):
    _, state = finished
    assert state["finished"] == 5
    assert state["complete"] >= 1
    assert state["best"]["score"] == max(trial["score"] for trial in state["pareto"])
    best = state["best"]
    assert best["score"] == pytest.approx(max(0.5 * best["perf_norm"] + 0.5 * best["speed_norm"], 0), abs=1e-9)


def test_status_prints_what_run_printed_as_json_or_as_a_table(cli, finished):
    home, state = finished
    assert cli("status", "--study", "small", "--json", cwd=home).json == state
    table = cli("status", "--study", "small", cwd=home).out
    assert "5 of 5 trials finished" in table
    assert f"★{state['best']['trial']}" in table


def test_status_draws_the_pareto_front(cli, finished, tmp_path):
    home, state = finished
    page = tmp_path / "front.html"
    assert cli("status", "--study", "small", "--plot", page, cwd=home).status == 0
    text = page.read_text()
    for trial in state["pareto"]:
        assert f"trial {trial['trial']}" in text
    cli("status", "--study", "small", "score.weight_perf=0.9", "score.weight_speed=0.1", "--plot", page, cwd=home)
    own_ids = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
    assert own_ids.sub("", page.read_text()) == own_ids.sub("", text)  # the study's weights, whatever the file says now
    refused = cli("status", "--study", "small", "--plot", tmp_path / "front.gif", cwd=home)
    assert refused.status == 2
    assert ".png or .html" in refused.err


@pytest.mark.long
def test_export_writes_a_model_that_stock_transformers_loads_and_scores_the_same(finished, tmp_path):
    import math

    import torch
    from transformers import AutoModelForCausalLM

    home, state = finished
    words = ("--study", "small", "--trial", state["best"]["trial"], "--to", tmp_path / "out" / "model", "--json")
    done = optuna_search("export", *words, cwd=home)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out" / "model"
    names = {file.name for file in path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "eval_result.json"} <= names
    assert [name for name in path.parent.iterdir() if name.name != "model"] == []
    result = json.loads((path / "eval_result.json").read_text())
    assert result["score"] == state["best"]["score"]
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    from search.config import compose
    from search.setup import setting

    file = compose.load("small", config_dir=home / "studies")
    shards = setting.prepare(file).texts.shards
    nll = []
    for window in (window for shard in shards for window in shard):
        ids = torch.tensor([window])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        nll += (-logprobs.gather(1, ids[0, 1:, None])[:, 0]).tolist()
    assert math.exp(sum(nll) / len(nll)) == pytest.approx(result["measurement"]["perplexity"], rel=1e-3)


def test_only_the_best_checkpoints_stay_and_other_trials_can_still_be_exported(cli, finished, tmp_path):
    home, state = finished
    complete = [trial["trial"] for trial in state["pareto"] if trial["trial"] != state["best"]["trial"]]
    assert len(list((home / "outputs" / "checkpoints").iterdir())) <= 2
    for number in complete[:1]:
        done = cli("export", "--study", "small", "--trial", number, "--to", tmp_path / str(number), cwd=home)
        assert done.status == 0, done.err
        assert "bit for bit" in done.out


@pytest.mark.long
def test_the_dashboard_serves_notes_numbers_and_measurement_files(finished):
    import socket
    import urllib.request

    home, state = finished
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def get(port, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=AT_ONCE_S) as answer:
            return answer.read()

    def answers(port):
        with contextlib.suppress(OSError):
            return bool(get(port, "/api/studies"))

    def serve():
        """Begin to serve on a free port, and wait until the server answers or has ended."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = subprocess.Popen(
            [sys.executable, "-m", "search.cli", "dashboard", "--study", "small", "--port", str(port)],
            cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        until(lambda: server.poll() is not None or answers(port))
        return port, server

    for _ in range(3):  # another program may take the port before the server does
        port, server = serve()
        if server.poll() is None:
            break
    try:
        assert server.poll() is None, server.stderr.read()
        summaries = json.loads(get(port, "/api/studies"))["study_summaries"]
        (study,) = [s for s in summaries if s["study_name"] == "small"]
        detail = json.loads(get(port, f"/api/studies/{study['study_id']}"))
        best = next(t for t in detail["trials"] if t["number"] == state["best"]["trial"])
        assert f"Score {state['best']['score']:.4f}" in best["note"]["body"]
        assert "Best feasible trial" in detail["note"]["body"]
        assert f"trial {state['best']['trial']}" in detail["note"]["body"]
        (artifact,) = best["artifacts"]
        assert artifact["mimetype"] == "application/json"
        path = f"/artifacts/{study['study_id']}/{best['trial_id']}/{artifact['artifact_id']}"
        assert json.loads(get(port, path))["perplexity"] == state["best"]["perplexity"]
        for trial in detail["trials"]:
            assert trial["note"]["body"].startswith(("**Score", "**pruned", "**failed"))
    finally:
        server.terminate()
        server.wait(AT_ONCE_S)


def test_export_of_a_trial_that_was_not_measured_is_refused(cli, finished, tmp_path):
    home, state = finished
    ended = [trial["trial"] for trial in state["ended"]]
    for number, said in [*((n, "never measured") for n in ended[:1]), (999, "trials 0 to")]:
        result = cli("export", "--study", "small", "--trial", number, "--to", tmp_path / "m", cwd=home)
        assert result.status == 2
        assert said in result.err
        assert not (tmp_path / "m").exists()


def test_export_does_not_replace_the_base_model_nor_what_holds_it(cli, finished, pico_llama):
    (home, _), base = finished, Path(pico_llama)
    before = (base / "model.safetensors").read_bytes()
    (base.parent / "config.json").touch()  # the directory around it looks like a model
    for to, said in ((base, "is the model that is read"), (base.parent, "holds the model that is read")):
        result = cli("export", "--study", "small", "--to", to, cwd=home)
        assert result.status == 2
        assert f"{said}, and would be lost; choose another --to" in result.err
    (base.parent / "config.json").unlink()
    assert (base / "model.safetensors").read_bytes() == before


def test_export_knows_for_whom_it_writes_before_it_builds(cli, finished, tmp_path):
    home, _ = finished
    for words in (["--for-transformers", "4.51"], ["export.for_transformers=bogus"]):
        result = cli("export", "--study", "small", *words, "--to", tmp_path / "m", cwd=home)
        assert result.status == 2
        assert "known are 4.55" in result.err
        assert "building" not in result.err


def test_export_refuses_to_replace_files_that_are_no_model(cli, finished, tmp_path):
    home, _ = finished
    (tmp_path / "notes.txt").write_text("mine")
    result = cli("export", "--study", "small", "--to", tmp_path, cwd=home)
    assert result.status == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resuming_with_another_space_or_formula_is_refused_with_the_differences(cli, finished):
    home, _ = finished
    for override, said in [
        ("score.weight_perf=0.7", "score.weight_perf is 0.5 there and 0.7 here"),
        ("space.precision=[W8A8]", "space.precision"),
        ("text.shards=7", "text.shards × windows_per_shard is 6 there and 7 here"),
    ]:
        result = cli("run", "--study", "small", override, cwd=home)
        assert result.status == 2
        assert said in result.err
        assert "--study-name" in result.err


def test_doctor_names_the_backends(cli):
    found = cli("doctor", "--json", cwd=Path.cwd()).json
    assert found["backends"]["transformers"] == "ready"
    assert set(found["backends"]) == {"transformers", "vllm"}


@pytest.mark.parametrize(("url", "said"), [("fake.db", "not a database URL"), ("postgresql://h:abc/x", "is no number")])
@pytest.mark.parametrize("command", ["status", "export", "confirm"])
def test_what_is_no_database_is_one_line_for_every_command(cli, tmp_path, command, url, said):
    result = cli(command, "--study", "demo", "--storage", url, cwd=tmp_path)
    assert result.status == 2
    assert said in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_status_without_a_study_creates_no_database(cli, tmp_path):
    result = cli("status", cwd=tmp_path)
    assert result.status == 2
    assert "no such file" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trails=3"], "did you mean 'trials'"),
        (["space.precision=[W8A9]"], "did you mean 'W8A8'"),
        (["space.num_hidden_layers=99"], "exceeds the base model's"),
        (["model.source=/no/such/model"], "/no/such/model"),
        (["evaluation.backend=vlm"], "not one of auto"),
        (["text.search=[/no/such.txt]"], "/no/such.txt"),
        (["text.window=4096", "text.shards=500"], "text"),
        (["--storage", "postgresql://u:secret@127.0.0.1:9/x"], "127.0.0.1"),
        (["--storage", "what"], "not a database URL"),
    ],
)
def test_wrong_input_is_refused_in_one_line(run_refused, home, words, said):
    line = run_refused(home, *words)
    assert said in line
    assert "secret" not in line


def test_cuda_without_a_gpu_is_refused(run_refused, home):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "no CUDA GPU" in run_refused(home, "evaluation.device=cuda")


def model_of(home):
    return home.parent / "model"


def test_a_model_without_weights_is_refused(run_refused, home):
    (model_of(home) / "model.safetensors").unlink()
    assert "safetensors" in run_refused(home)


def test_pickled_weights_are_refused(run_refused, home):
    (model_of(home) / "model.safetensors").rename(model_of(home) / "pytorch_model.bin")
    assert "safetensors" in run_refused(home)


def test_truncated_weights_are_refused(run_refused, home):
    path = model_of(home) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors" in run_refused(home)


def test_a_corrupt_safetensors_header_is_refused(run_refused, home):
    path = model_of(home) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    assert "model.safetensors" in run_refused(home)


def test_a_model_without_a_tokenizer_is_refused(run_refused, home):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_of(home) / name).unlink()
    assert "tokenizer" in run_refused(home)


def test_an_unknown_architecture_is_refused(run_refused, home):
    path = model_of(home) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "mamba9", "architectures": ["Mamba9"]}))
    line = run_refused(home)
    assert "mamba9" in line
    assert "exaone4" in line


def test_a_model_that_yields_nan_fails_trials_until_the_study_stops_after_too_many(cli, home):
    """One norm of the last layer yields NaN, so that every plan that keeps this layer fails."""
    import torch
    from safetensors.torch import load_file, save_file

    path = model_of(home) / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors, reverse=True) if "down_proj" in name)
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    result = cli("run", "--study", "small", cwd=home)
    assert result.status == 2
    assert "nan" in result.err.lower()


def test_a_full_disk_stops_the_study_and_uses_up_no_plan(cli, home, tmp_path):
    """outputs/ is on a file system that is too small for a checkpoint."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs here")
    try:
        result = cli("run", "--study", "small", f"outputs={small}", "--trials", "2", "--json", cwd=home)
        assert result.status == 1, result.err
        assert "nothing is lost: free some space there" in result.err
        assert "disk" in result.err
    finally:
        subprocess.run(["umount", str(small)], check=True)
