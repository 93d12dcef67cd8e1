"""A server's command, its end and the numbers of a load; with vLLM, a real server and `vllm bench serve`."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evaluator import backends, serve_bench, served, server, speed
from evaluator.errors import EngineCrashed
from evaluator.workload import Workload
from tests.waiting import gone, until

RESULT = json.loads((Path(__file__).parent / "results" / "vllm_bench_serve.json").read_text())


def test_a_result_of_vllm_bench_serve_is_read():
    """Written by vLLM 0.32 on a CPU: 8 requests, 4 at once."""
    run = served.of_result(RESULT, 4, None)
    assert (run.requests, run.input_tokens, run.output_tokens, run.load) == (8, 159, 106, "4 at once")
    assert run.tokens_per_s == pytest.approx(run.output_tokens / run.seconds)
    assert 1 / run.seconds_per_token == pytest.approx(run.tokens_per_s)
    latencies = sorted(RESULT["latencies"])
    assert run.e2el_ms.mean == pytest.approx(1e3 * sum(latencies) / 8)
    assert latencies[0] * 1e3 < run.ttft_ms.p99 + run.e2el_ms.p50 < run.e2el_ms.p50 + run.e2el_ms.p95
    assert 0 < run.goodput_per_s < run.requests_per_s
    assert served.from_dict(json.loads(json.dumps(dataclasses.asdict(run)))) == run
    assert served.of_result({**RESULT, "request_goodput": None}, 4, None).goodput_per_s is None


def test_at_a_rate_the_time_of_a_token_is_the_latency():
    """All runs at one rate take the same time, whatever the model."""
    run = served.of_result(RESULT, None, 2.0)
    assert run.load == "2 requests/s"
    assert run.seconds_per_token == pytest.approx(sum(RESULT["latencies"]) / 106)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"failed": 1, "completed": 7}, "1 of 8 requests failed"),
        ({"completed": 0}, "0 of 0 requests failed"),
        ({"total_output_tokens": 0}, "no token was generated"),
        ({"p99_ttft_ms": float("nan")}, "its p99_ttft_ms is nan"),
        ({"duration": None}, "its duration is None"),
    ],
)
def test_what_is_no_measurement_is_refused(values, told):
    with pytest.raises(ValueError, match=told):
        served.of_result({**RESULT, **values}, 4, None)


def test_runs_under_one_load_are_averaged():
    run = served.of_result(RESULT, 4, None)
    slow = dataclasses.replace(
        run, seconds=3 * run.seconds, goodput_per_s=0.0, ttft_ms=served.Quantiles(*[v * 3 for v in (1, 2, 3, 4)])
    )
    both = served.mean_of([run, slow])
    assert (both.runs, both.requests) == (2, 8)
    assert both.seconds == pytest.approx(2 * run.seconds)
    assert both.goodput_per_s == pytest.approx(run.goodput_per_s / 2)
    assert both.ttft_ms.p99 == pytest.approx((run.ttft_ms.p99 + 12) / 2)
    assert both.e2el_ms.p50 == pytest.approx(run.e2el_ms.p50)
    with pytest.raises(ValueError, match="only runs under one load"):
        served.mean_of([run, dataclasses.replace(run, concurrency=8)])


def test_the_time_per_token_is_the_mean_over_the_concurrencies():
    class Serving:
        def __init__(self, per_token):
            self.per_token = per_token

        def serve(self, size):
            return [size * self.per_token[size]]

    workload = Workload(kind="serve", concurrencies=(1, 8), turns=4)
    timing = speed.time_in_turn(Serving({1: 4e-3, 8: 2e-3}), Serving({1: 8e-3, 8: 2e-3}), workload)
    assert timing.time_per_token_ms == pytest.approx(3.0)
    assert timing.base_time_per_token_ms == pytest.approx(5.0)
    assert (timing.time_ratio, timing.samples) == (pytest.approx(0.6), 8)


def test_arguments_become_options(tmp_path):
    given = {
        "max_model_len": 4096,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "compilation_config": {"mode": 0},
        "kv_cache_dtype": "fp8",
        "max_num_seqs": None,
        "trust_remote_code": True,
    }
    words = server.command(tmp_path, "name", 5, given)
    text = " ".join(words)
    assert "--max-model-len 4096 --enforce-eager --no-enable-prefix-caching --compilation-config" in text
    assert words[words.index("--compilation-config") + 1] == '{"mode": 0}'
    assert words[words.index("--kv-cache-dtype") + 1] == "fp8"
    assert "max-num-seqs" not in text
    assert "trust" not in text
    assert words[words.index("--host") + 1] == "127.0.0.1"


def test_lengths_become_a_mean_and_a_share():
    assert serve_bench.spread((64, 256)) == (160, pytest.approx(0.6))
    assert serve_bench.spread((128, 128)) == (128, 0.0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("who", ["caller", "keeper"])
def test_what_a_keeper_runs_ends_with_its_caller(tmp_path, who):
    """Both are killed by SIGKILL, which nothing can catch; the command's own children go with the caller too."""
    words = "import os, subprocess, sys, time; child = subprocess.Popen(['sleep', '1000']); "
    words += f"open({str(tmp_path / 'new')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); "
    words += f"os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'pids')!r}); time.sleep(1000)"
    keeper = [sys.executable, "-m", "evaluator.keeper", sys.executable, "-c", words]
    start = (
        f"import subprocess, time; k = subprocess.Popen({keeper!r}, stdin=subprocess.PIPE, start_new_session=True); "
    )
    start += f"open({str(tmp_path / 'keeper')!r}, 'w').write(str(k.pid)); time.sleep(1000)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)}
    caller = subprocess.Popen([sys.executable, "-c", start], env=environment)
    try:
        keeper_pid = tmp_path / "keeper"
        assert until((tmp_path / "pids").exists)
        assert until(lambda: keeper_pid.exists() and keeper_pid.read_text())  # written after the keeper has begun
        command, child = map(int, (tmp_path / "pids").read_text().split())
        pid = caller.pid if who == "caller" else int(keeper_pid.read_text())
        assert not gone(command, 0.2)
        os.kill(pid, signal.SIGKILL)
        assert gone(command)
        if who == "caller":
            assert gone(child)
        else:
            os.kill(child, signal.SIGKILL)
    finally:
        caller.kill()
        caller.wait()


def test_a_server_that_ends_is_told_with_its_last_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "command", lambda *_: [sys.executable, "-c", "print('no such thing'); exit(3)"])
    with pytest.raises(EngineCrashed, match=r"start: it ended; its log is .*its last words: no such thing"):
        server.Server(tmp_path, tmp_path / "server.log")


def processes_of(name):
    """Return the keeper and the server with this model name, and what the server started."""
    named, group = [], []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if name in place.read_text():
                named.append(int(place.parent.name))
        except OSError:
            continue
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(place.name)) in named:
                group.append(int(place.name))
    return sorted({*named, *group})


@pytest.mark.vllm
@pytest.mark.skipif(backends.unavailable("vllm") is not None, reason=str(backends.unavailable("vllm")))
def test_a_real_server_under_load(smollm2, tmp_path):
    """Two loads, prompts from a file, requests that fail, and no process that is left."""
    workload = Workload(
        kind="serve", concurrencies=(1, 2), requests=2, input_tokens=(8, 16), output_tokens=(4, 8),
        goodput={"e2el_ms": 60_000.0}, turns=2,
    )  # fmt: skip
    arguments = {"max_model_len": 256, "gpu_memory_utilization": 0.1, "enforce_eager": True}
    with server.Server(smollm2, tmp_path / "server.log", arguments) as running:
        timed = serve_bench.Timed(running, workload, 200.0)
        timing = speed.time_in_turn(timed, timed, dataclasses.replace(workload, concurrencies=(2,)))
        assert timing.samples == 2
        (means,) = timed.means()
        assert means.goodput_per_s == pytest.approx(means.requests_per_s)
        assert 8 <= means.output_tokens <= 16
        assert 0 < means.ttft_ms.p50 <= means.e2el_ms.p50 <= means.e2el_ms.p99
        with pytest.raises(EngineCrashed, match="2 of 2 requests failed"):
            serve_bench.run(running, dataclasses.replace(workload, input_tokens=(300, 300)), 2, 200.0)
        pids = processes_of(running.name)
        assert len(pids) >= 2  # the keeper, the server and its engine
    assert all(map(gone, pids))


@pytest.mark.vllm
@pytest.mark.skipif(backends.unavailable("vllm") is not None, reason=str(backends.unavailable("vllm")))
def test_a_real_server_ends_with_a_caller_that_is_killed(smollm2, tmp_path):
    """Its engine's processes too, which hold the memory."""
    arguments = {"max_model_len": 256, "gpu_memory_utilization": 0.1, "enforce_eager": True}
    start = "import sys, time; from evaluator.server import Server; "
    start += f"server = Server({str(smollm2)!r}, {str(tmp_path / 'server.log')!r}, {arguments!r}); "
    start += "print(server.name, flush=True); time.sleep(600)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)}
    caller = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, env=environment, text=True)
    try:
        pids = processes_of(caller.stdout.readline().strip())
        assert len(pids) >= 3
    finally:
        caller.kill()
        caller.wait()
    assert all(map(gone, pids))
