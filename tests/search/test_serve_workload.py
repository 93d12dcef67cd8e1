"""A workload of kind serve in a study: its keys, what is refused, and what is kept and shown of it."""

import dataclasses
import json
from pathlib import Path

import pytest

from evaluator import served
from evaluator.measurement import Measurement, Workload
from search.config import compose
from search.errors import UsageError
from search.json_values import measurement_from
from search.setup.definition import of_file
from search.setup.server import require_serving
from search.show import served_table

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
        return compose.validate(values, "this test")

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


def measurement(**values):
    required = {
        field.name: 1.0
        for field in dataclasses.fields(Measurement)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    texts = ("backend", "engine_version", "transformers_version", "torch_version", "device", "dtype", "text_digest")
    named = dict.fromkeys((*texts, "logits_sha256", "weights_sha256"), "text")
    counts = ("tokens", "timing_samples", "total_parameters", "number_of_layers", "number_of_heads", "hidden_dim")
    whole = dict.fromkeys(counts, 4)
    return Measurement(**{**required, **named, **whole, "shard_nll": (1.0, 2.0), "workload": Workload(), **values})


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


def test_a_report_shows_each_load_beside_the_baselines():
    runs = (served.of_result(RESULT, 1, None), served.of_result(RESULT, 8, None))
    faster = dataclasses.replace(runs[0], tokens_per_s=1234.5, goodput_per_s=None)
    rows = served_table.rows(measurement(served=(faster, runs[1])), measurement(served=runs))
    assert [row[:3] for row in rows] == [
        ["1 at once", "baseline", "65.1"],
        ["1 at once", "model", "1,234.5"],
        ["8 at once", "baseline", "65.1"],
        ["8 at once", "model", "65.1"],
    ]
    assert [row[4] for row in rows] == ["3.07", "", "3.07", "3.07"]
    assert rows[0][5] == "114.9 / 207.3 / 207.4"
    assert len(rows[0]) == len(served_table.HEADER)
    assert served_table.rows(measurement(), measurement()) == []
