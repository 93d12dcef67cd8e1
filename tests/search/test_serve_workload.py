"""A workload of kind serve in a study: its keys, what is refused, and what is kept and shown of it."""

import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import optuna
import pytest
import rich.console

from evaluator import backends, serve_bench, served, server
from evaluator.speed_table import SpeedTable
from evaluator.workload import Workload
from search.config import compose, validation
from search.errors import UsageError
from search.json_values import measurement_from
from search.setup import setting
from search.setup.definition import of_file
from search.setup.server import require_serving
from search.show import served_table
from search.show.forecast_view import ForecastView, forecast_table
from search.stages import speed_table
from search.stages.forecast import STAND_IN_ERROR
from tests.measurements import measurement

RESULT = json.loads((Path(__file__).parents[1] / "evaluator" / "results" / "vllm_bench_serve.json").read_text())
SERVE = {
    "kind": "serve",
    "concurrencies": [1, 8],
    "requests": 16,
    "input_tokens": "20..60",
    "output_tokens": 30,
    "goodput": {"ttft_ms": 500},
    "server": {"max_model_len": 4096},
}


@pytest.fixture
def file(pico_llama):
    def make(workload=SERVE, backend="vllm", **text):
        values = {
            "study_name": "served",
            "model": {"source": str(pico_llama)},
            "evaluation": {"backend": backend, "workload": workload},
            "text": text,
        }
        return validation.validate(values, "this test")

    return make


def test_a_study_keeps_the_keys_of_its_kind(file):
    whole = {
        "kind": "serve", "concurrencies": [1, 8], "request_rate": None, "requests": 16, "input_tokens": [20, 60],
        "output_tokens": [30, 30], "ignore_eos": True, "goodput": {"ttft_ms": 500}, "server": {"max_model_len": 4096},
        "turns": 12, "seed": 0,
    }  # fmt: skip
    assert of_file(file())["evaluation"]["workload"] == whole
    workload = Workload.from_dict(file().evaluation.workload.of_kind)
    assert workload.to_dict() == whole
    assert workload.sizes == (1, 8)
    assert Workload.from_dict(json.loads(json.dumps(workload.to_dict()))) == workload
    assert Workload.from_dict(file({**SERVE, "request_rate": 4}).evaluation.workload.of_kind).sizes == (1,)
    for kind in ("decode", "batch"):
        kept = of_file(file({**SERVE, "kind": kind}))["evaluation"]["workload"]
        assert not {"concurrencies", "request_rate", "goodput", "server"} & set(kept)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"requests": 7}, "7 requests are never 8 at once; raise requests, or lower concurrencies"),
        ({"server": {"max_model_len": 80}}, "server: max_model_len is 80; a request takes 90 tokens"),
        ({"server": {"max_model_len": True}}, "server: max_model_len is True"),
        ({"ignore_eos": False}, "name a file of requests with text.prompts"),
    ],
)
def test_a_load_that_cannot_be_put_on_a_server_is_refused(file, changed, told):
    named = file({**SERVE, **changed})
    with pytest.raises(UsageError, match=told):
        require_serving(named, "vllm", Workload.from_dict(named.evaluation.workload.of_kind))


def test_what_is_allowed(file):
    for changed in ({}, {"request_rate": 2.0, "requests": 1}, {"server": {"max_model_len": 90}}):
        named = file({**SERVE, **changed})
        require_serving(named, "vllm", Workload.from_dict(named.evaluation.workload.of_kind))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"concurrencies": []}, "concurrencies"),
        ({"concurrencies": [0]}, "concurrencies"),
        ({"request_rate": 0}, "request_rate"),
        ({"goodput": {"latency": 5}}, "goodput"),
        ({"goodput": {"ttft_ms": 0}}, "goodput"),
    ],
)
def test_keys_with_wrong_values_are_refused(file, changed, told):
    with pytest.raises(UsageError, match=told):
        file({**SERVE, **changed})


def test_another_engine_is_refused_in_one_line(cli, tmp_path, pico_llama):
    words = (f"model.source={pico_llama}", "evaluation.workload.kind=serve", "evaluation.backend=transformers")
    ended = cli("baseline", "--study", "demo", *words, f"outputs={tmp_path}", cwd=tmp_path)
    assert ended.status == 2
    assert "serve times `vllm serve`, and the engine is transformers; choose evaluation.backend=vllm" in ended.err
    assert "Traceback" not in ended.err


def test_what_a_server_did_is_kept_with_the_measurement():
    measured = measurement()
    runs = (served.of_result(RESULT, 1, None), served.of_result(RESULT, 8, None))
    workload = Workload(kind="serve", concurrencies=(1, 8), goodput={"ttft_ms": 500.0}, server={"max_num_seqs": 3})
    one = dataclasses.replace(measured, served=runs, workload=workload)
    written = json.loads(json.dumps(one.to_dict()))
    assert written["served"][1]["ttft_ms"]["p99"] == pytest.approx(RESULT["p99_ttft_ms"])
    assert type(one).from_dict(written) == one
    assert measurement_from(written) == one
    assert "served" not in measured.to_dict()


STUDY = """
defaults: [_base, _self_]
study_name: served
trials: 2
storage: sqlite:///{home}/studies.db
outputs: {home}/outputs
model: {{source: {model}}}
space:
  num_hidden_layers: {{low: 2, high: 4}}
text: {{window: 32, shards: 3, calibration_windows: 2}}
evaluation:
  backend: transformers
  score_se: 0
  workload: {{kind: serve, turns: 4, {workload}}}
confirm: {{top: 1, pairs: 1}}
tracking: {{mlflow: false}}
"""
TWO_AT_ONCE = "concurrencies: [2], requests: 2"
OF_LENGTHS = "concurrencies: [3, 1], requests: 3, input_tokens: [4, 12], output_tokens: [2, 4]"
SERVER = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(sys.argv[1].encode())
    do_POST = do_GET
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Answer).serve_forever()
"""
CLIENT = """
import json, sys
result = json.load(open(sys.argv[1]))
result["duration"] = float(sys.argv[2])
json.dump(result, open(sys.argv[3], "w"))
"""


@pytest.fixture
def stand_ins(monkeypatch):
    """A server that answers and a client that writes a result of vLLM's, in place of vLLM, which is not installed.

    A cut model's run takes 0.8 of the base model's seconds.
    """
    source = str(Path(__file__).parents[1] / "evaluator" / "results" / "vllm_bench_serve.json")

    def client(running, workload, concurrency, directory):
        seconds = "2.0" if json.loads((running.path / "config.json").read_text())["num_hidden_layers"] > 4 else "1.6"
        return [sys.executable, "-c", CLIENT, source, seconds, str(directory / serve_bench.RESULT)]

    monkeypatch.setattr(
        server, "command", lambda path, name, port, given: [sys.executable, "-c", SERVER, name, str(port)]
    )
    monkeypatch.setattr(serve_bench, "command", client)
    monkeypatch.setattr(setting, "require_serving", lambda *_: None)


@pytest.mark.long
def test_a_study_of_servers(cli, stand_ins, tmp_path, pico_llama):
    """Baseline, trials and the confirmation are timed by servers, in fresh ones of its own; what they did is kept."""
    (tmp_path / "served.yaml").write_text(STUDY.format(home=tmp_path, model=pico_llama, workload=TWO_AT_ONCE))
    ended = cli("run", "--study", "served", "--config-dir", tmp_path, "--json", cwd=tmp_path)
    assert ended.status == 0, ended.err
    baseline = json.loads((tmp_path / "outputs/baseline_result.json").read_text())
    assert [run["concurrency"] for run in baseline["served"]] == [2]
    assert baseline["served"][0]["seconds"] == pytest.approx(2.0)
    assert baseline["time_per_token_ms"] == pytest.approx(2000 / 106)
    assert baseline["served"][0]["runs"] >= 4
    study = optuna.load_study(study_name="served", storage=f"sqlite:///{tmp_path}/studies.db")
    times = [trial.user_attrs["time_per_token_ms"] for trial in study.trials if "time_per_token_ms" in trial.user_attrs]
    assert any(time == pytest.approx(1600 / 106) for time in times)
    pairs = [pair for file in (tmp_path / "outputs/confirmed").glob("*.json") for pair in pairs_in(file)]
    assert pairs
    assert all(pair["time_ratio"] == pytest.approx(0.8) for pair in pairs)
    assert (tmp_path / "outputs/logs/server-confirm-1.log").exists()
    assert not list((tmp_path / "outputs").glob("forecast/speed-*"))


@pytest.mark.long
def test_engines_stand_for_servers_in_a_forecast(cli, stand_ins, tmp_path, pico_llama):
    """Of each concurrency they are given as many requests at once, of mean lengths; and that is said."""
    (tmp_path / "served.yaml").write_text(STUDY.format(home=tmp_path, model=pico_llama, workload=OF_LENGTHS))
    prepared = setting.prepare(compose.load("served", (), tmp_path))
    batches = speed_table.stand_ins(prepared)
    assert [one.workload.sizes for one in batches] == [(1,), (3,)]
    for one in batches:
        assert len(one.workload.asked) == one.workload.sizes[0]
        assert {(len(each.prompt), each.limits.max_tokens) for each in one.workload.asked} == {(8, 3)}
        assert all(each.limits.ignore_eos for each in one.workload.asked)
    of_file = dataclasses.replace(prepared, prompts=((1,) * 20, (2,) * 30, (3,) * 25))
    assert {len(each.prompt) for one in speed_table.stand_ins(of_file) for each in one.workload.asked} == {25}
    words = ("forecast", "--study", "served", "--config-dir", tmp_path)
    ended = cli(*words, "--json", cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert ended.json["stands_for_server"]
    assert list(ended.json["base_ms"]) == ["1", "3"]
    (table,) = (tmp_path / "outputs/forecast").glob("speed-*.json")
    made = SpeedTable.from_dict(json.loads(table.read_text()))
    assert made.probes
    assert all(set(probe.ratio) == {1, 3} for probe in made.probes)
    best = ended.json["best"][0]
    assert best["speed_norm_se"] >= math.hypot(made.ratio_error, STAND_IN_ERROR) - 1e-9
    before = table.stat().st_mtime_ns
    shown = cli(*words, cwd=tmp_path)
    assert "no server was started for these times" in " ".join(shown.out.split())
    assert table.stat().st_mtime_ns == before


def test_at_a_rate_nothing_stands_for_a_server(stand_ins, tmp_path, pico_llama):
    (tmp_path / "served.yaml").write_text(STUDY.format(home=tmp_path, model=pico_llama, workload=OF_LENGTHS))
    prepared = setting.prepare(compose.load("served", ["evaluation.workload.request_rate=2"], tmp_path))
    assert speed_table.stand_ins(prepared) == []
    assert speed_table.missing(prepared) == []


def test_a_forecast_says_where_its_times_are_from():
    def lines_of(**values):
        view = ForecastView("served", "cpu", "vllm", floor_ms=None, own_score=0.5, pays=(), costs=(), lossless=0.6,
                            best=(), **values)  # fmt: skip
        console = rich.console.Console(file=io.StringIO(), width=200)
        console.print(forecast_table(view))
        return console.file.getvalue()

    assert "nothing was timed" in lines_of(base_ms={}, whole_requests=True)
    of_server = lines_of(base_ms={1: 2.0, 8: 4.0}, whole_requests=True, stands_for_server=True)
    assert "2.0000 ms with 1 at once, 0.5000 ms with 8 at once" in of_server
    assert "no server was started for these times" in of_server
    of_decode = lines_of(base_ms={1: 2.0})
    assert "one decode step of the base model: 2.000 ms at batch 1" in of_decode
    assert "nothing was timed" not in of_decode


CHATS = """
defaults: [_base, _self_]
study_name: chats
outputs: {home}/outputs
model: {{source: {model}}}
text: {{window: 32, shards: 2, calibration_windows: 2, report: null, prompts: {home}/chats.jsonl}}
evaluation:
  backend: vllm
  gpu_memory_utilization: 0.1
  workload:
    kind: serve
    request_rate: 4
    requests: 3
    output_tokens: [4, 12]
    ignore_eos: false
    goodput: {{e2el_ms: 60000}}
    server: {{max_model_len: 256, enforce_eager: true}}
    turns: 4
tracking: {{mlflow: false}}
"""


@pytest.mark.vllm
@pytest.mark.skipif(backends.unavailable("vllm") is not None, reason=str(backends.unavailable("vllm")))
def test_chats_of_a_file_come_to_a_real_server_at_a_rate(cli, smollm2, tmp_path):
    """The server reads the very tokens that the model's template gives, and answers end by themselves."""
    questions = ("Name a capital.", "What is 2 + 3? Answer with the number alone.", "Say «hello» in French, and stop.")
    chats = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)) + "\n")
    (tmp_path / "chats.yaml").write_text(CHATS.format(home=tmp_path, model=smollm2))
    ended = cli("baseline", "--study", "chats", "--config-dir", tmp_path, "--json", cwd=tmp_path)
    assert ended.status == 0, ended.err
    (run,) = ended.json["served"]
    asked = setting.prepare(compose.load("chats", (), tmp_path), search=False).prompts
    assert (run["request_rate"], run["concurrency"], run["requests"]) == (4.0, None, 3)
    assert run["input_tokens"] == sum(map(len, asked))
    assert 3 <= run["output_tokens"] <= 36
    assert run["goodput_per_s"] == pytest.approx(run["requests_per_s"])
    latency = run["e2el_ms"]["mean"] * 3 / run["output_tokens"]  # of the first run that counts, and of all
    assert ended.json["time_per_token_ms"] == pytest.approx(latency, rel=0.5)
    log = (tmp_path / "outputs/logs/server-baseline.log").read_text()
    assert "enforce_eager" in log


def pairs_in(file):
    return json.loads(file.read_text()).get("pairs", [])


def test_a_report_shows_each_load_beside_the_baselines():
    runs = (served.of_result(RESULT, 1, None), served.of_result(RESULT, 8, None))
    faster = dataclasses.replace(runs[0], tokens_per_s=1234.5, goodput_per_s=None)
    rows = served_table.rows((faster, runs[1]), runs)
    assert [row[:3] for row in rows] == [
        ["1 at once", "baseline", "65.1"],
        ["1 at once", "model", "1,234.5"],
        ["8 at once", "baseline", "65.1"],
        ["8 at once", "model", "65.1"],
    ]
    assert [row[4] for row in rows] == ["3.07", "", "3.07", "3.07"]
    assert rows[0][5] == "114.9 / 207.3 / 207.4"
    assert len(rows[0]) == len(served_table.HEADER)
    assert served_table.rows((), runs) == []
