"""Time whole requests: recipes against the base model, all as `vllm bench throughput` does, and an A/A.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/gpu/batch.py --study NAME --config-dir DIR [--repeats 10]
        [--reference] [--json FILE] [KEY=VALUE ...]

The study's workload is of kind batch with random prompts. Every repeat starts its own engine process, as a trial does.
--reference runs the same requests through the code of `vllm bench throughput`, with vLLM's own defaults and without a
prefix cache, in a process for each model; they start together and are timed one after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

from search.config import compose
from search.setup import setting as settings
from search.stages.bench import Bench

PASSES = 8  # of the reference, after one that warms up


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        of_reference(*map(pathlib.Path, sys.argv[2:6]), share=float(sys.argv[6]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--study", required=True)
    parser.add_argument("--config-dir", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--precisions", nargs="*", default=["W8A8", "FP8_DYNAMIC", "W4A16"])
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_intermixed_args()
    file = compose.load(arguments.study, arguments.words, arguments.config_dir)
    setting = settings.prepare(file, said)
    own = setting.model.identity
    plans = {name: dataclasses.replace(own, precision=name) for name in arguments.precisions}
    fewer = own.num_hidden_layers - 2
    plans[f"{fewer} layers"] = dataclasses.replace(own, num_hidden_layers=fewer, drop_from="top")
    found: dict[str, Any] = {
        "workload": dataclasses.asdict(dataclasses.replace(setting.workload, asked=())),
        "runs": [],
    }
    paths = {"base model": setting.model.path}

    def keep() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))

    print(f"{'model':>12} {'us a token':>10} {'base':>7} {'ratio':>7} {'se':>7} {'seconds':>8}", flush=True)
    with Bench.of(setting) as bench:
        base = bench.baseline(said)

        def timed(name: str, path: pathlib.Path, sha: str) -> float:
            began = time.monotonic()
            one = bench.measure(path, sha, base, said, enough=setting.enough)
            ran = {
                "model": name, "us": 1e3 * one.time_per_token_ms, "base_us": 1e3 * one.base_time_per_token_ms,
                "ratio": one.time_ratio, "se": one.time_ratio_se, "seconds": time.monotonic() - began,
            }  # fmt: skip
            found["runs"].append(ran)
            keep()
            print(
                f"{name:>12} {ran['us']:10.2f} {ran['base_us']:7.2f} {ran['ratio']:7.4f} {ran['se']:7.4f} "
                f"{ran['seconds']:8.1f}",
                flush=True,
            )
            return one.time_ratio

        for name, plan in plans.items():
            path, sha = bench.build(plan, said)
            kept = setting.outputs / "kept" / name.replace(" ", "-")
            kept.mkdir(parents=True, exist_ok=True)
            for part in path.iterdir():
                (kept / part.name).unlink(missing_ok=True)
                (kept / part.name).hardlink_to(part)
            paths[name] = kept
            timed(name, kept, sha)
        if arguments.reference:
            bench.close()  # the reference has the GPU and its host for itself
            found["reference"] = reference(setting, paths)
            keep()
        same = [timed("base model", setting.model.path, base.weights_sha256) for _ in range(arguments.repeats)]
        if len(same) > 1:
            print(
                f"A/A: mean {statistics.fmean(same):.4f}, standard deviation {statistics.stdev(same):.4f}", flush=True
            )


def reference(setting: settings.Setting, paths: dict[str, pathlib.Path]) -> dict[str, list[float]]:
    """Return each model's seconds per generated token in each pass of the reference, and print the table."""
    scratch = setting.outputs / "reference"
    scratch.mkdir(parents=True, exist_ok=True)
    requests = [{"prompt": list(one.prompt), "tokens": one.limits.max_tokens} for one in setting.workload.asked]
    (scratch / "requests.json").write_text(json.dumps(requests))
    running = {}
    for name, path in paths.items():
        out = scratch / f"{name.replace(' ', '-')}.json"
        words = [path, scratch / "requests.json", scratch / "lock", out, 0.8 / len(paths)]
        log = out.with_suffix(".log").open("w")
        command = [sys.executable, __file__, "one", *map(str, words)]
        running[name] = (subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), out)
    found: dict[str, list[float]] = {}
    for name, (process, out) in running.items():
        if process.wait() == 0:
            found[name] = json.loads(out.read_text())
        else:
            print(f"{name}: the reference ended with {process.returncode}; see {out.with_suffix('.log')}")
    base = min(found.get("base model", [1.0]))
    print(f"{'reference':>12} {'best us':>10} {'median':>7} {'ratio of best':>14}")
    for name, seconds in found.items():
        best, middle = min(seconds), statistics.median(seconds)
        print(f"{name:>12} {1e6 * best:10.2f} {1e6 * middle:7.2f} {best / base:14.4f}", flush=True)
    return found


def of_reference(
    model: pathlib.Path, requests: pathlib.Path, lock: pathlib.Path, out: pathlib.Path, *, share: float
) -> None:
    """Run the requests through the code of `vllm bench throughput` in this process; write seconds per token."""
    from vllm import LLM
    from vllm.benchmarks import throughput
    from vllm.benchmarks.datasets import SampleRequest

    asked = json.loads(requests.read_text())
    samples = [
        SampleRequest({"prompt_token_ids": one["prompt"]}, len(one["prompt"]), one["tokens"])  # type: ignore[arg-type]
        for one in asked
    ]
    most = max(len(one["prompt"]) + one["tokens"] for one in asked)
    with lock.open("w") as held:
        llm = LLM(
            str(model), max_model_len=most, gpu_memory_utilization=share, enable_prefix_caching=False,
            kv_cache_memory_bytes=8 << 30, disable_log_stats=True,
        )  # fmt: skip
        fcntl.flock(held, fcntl.LOCK_EX)
        seconds = []
        for number in range(PASSES + 1):
            elapsed, _ = throughput._run_vllm_requests(llm, samples, 1, True, False, False, False)
            if number:
                seconds.append(elapsed / sum(one["tokens"] for one in asked))
    out.write_text(json.dumps(seconds))


def said(text: str) -> None:
    """Print a step to standard error."""
    print("…", text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
