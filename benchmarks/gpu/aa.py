"""Time a checkpoint against itself: how far measured ratios lie from 1 on this machine, and what each stage takes.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/gpu/aa.py DIRECTORY [--backend vllm] [--repeats 10] [--json FILE]

--candidate DIRECTORY times another checkpoint against the first. Text for the NLL is what Python ships; it is scored
only when the checkpoint has a tokenizer.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
import tempfile
import time

from evaluator import backends, embedded_texts, process, quality, speed, texts
from evaluator.backends import EngineSettings
from evaluator.workload import Workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--candidate", type=pathlib.Path)
    parser.add_argument("--backend", default="auto", choices=["auto", *backends.names()])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--decode-steps", type=int, default=16)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--memory", type=float, default=0.3, help="share of the GPU's memory for each engine")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--logs", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "optuna-search-aa")
    arguments = parser.parse_args()

    backend = backends.choose(arguments.backend)
    workload = Workload(tuple(arguments.batch_sizes), arguments.prompt_tokens, arguments.decode_steps, arguments.turns)
    settings = EngineSettings(
        device=arguments.device,
        max_model_len=max(arguments.window + 8, workload.prompt_tokens + workload.decode_steps + 16),
        batch_sizes=workload.batch_sizes,
        gpu_memory_utilization=arguments.memory,
        compile=arguments.compile,
        start_timeout_s=600,
        call_timeout_s=600,
    )
    candidate_path = arguments.candidate or arguments.checkpoint
    found: dict = {"backend": backend, "workload": vars(workload) | {}, "runs": []}
    with (
        process.EngineProcess(backend, arguments.checkpoint, settings, arguments.logs / "baseline.log") as baseline,
        process.EngineProcess(backend, candidate_path, settings, arguments.logs / "candidate.log") as candidate,
    ):
        found["facts"] = candidate.facts()
        found["seconds"] = {"baseline": baseline.seconds, "candidate": candidate.seconds}
        print(json.dumps(found["facts"], indent=1), file=sys.stderr)
        found["nll"] = score(arguments, {"baseline": baseline, "candidate": candidate})
        alone = speed.time_in_turn(baseline, baseline, workload).time_per_token_ms  # as a study's baseline is measured
        found["alone_ms"] = alone
        print(f"{'run':>4} {'candidate ms':>13} {'baseline ms':>12} {'ratio':>8} {'se':>7} {'SpeedNorm':>10} {'s':>6}")
        for run in range(arguments.repeats):
            started = time.monotonic()
            timing = speed.time_in_turn(candidate, baseline, workload, expected_base_ms=alone)
            spent = time.monotonic() - started
            found["runs"].append({**vars(timing), "speed_norm": 1 - timing.time_ratio, "seconds": spent})
            print(
                f"{run:4d} {timing.time_per_token_ms:13.4f} {timing.base_time_per_token_ms:12.4f} "
                f"{timing.time_ratio:8.4f} {timing.time_ratio_se:7.4f} {1 - timing.time_ratio:10.4f} {spent:6.1f}",
                flush=True,
            )
    ratios = [run["time_ratio"] for run in found["runs"]]
    found["summary"] = {
        "mean_ratio": statistics.fmean(ratios),
        "sd_ratio": statistics.stdev(ratios) if len(ratios) > 1 else None,
        "min_ratio": min(ratios),
        "max_ratio": max(ratios),
        "rms_reported_se": math.sqrt(statistics.fmean(run["time_ratio_se"] ** 2 for run in found["runs"])),
    }
    print()
    for name, value in found["summary"].items():
        print(f"{name:16s} {value if value is None else round(value, 4)}")
    for name, stages in found["seconds"].items():
        print(f"{name:16s} " + ", ".join(f"{stage} {spent:.2f} s" for stage, spent in stages.items()))
    for name, scored in found["nll"].items():
        print(f"{name:16s} {json.dumps(scored)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def score(arguments: argparse.Namespace, engines: dict) -> dict:
    """Perplexity on the embedded text and seconds, first and second call: the first one warms up."""
    if not (arguments.checkpoint / "tokenizer_config.json").is_file():
        return {}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint, trust_remote_code=False)
    windows = texts.windows(tokenizer, embedded_texts.documents(), arguments.window, arguments.windows)
    found = {}
    for name, engine in engines.items():
        spent = []
        for _ in range(2):
            started = time.monotonic()
            nll = engine.nll(windows)
            spent.append(round(time.monotonic() - started, 3))
        mean = math.fsum(map(math.fsum, nll)) / sum(map(len, nll))
        found[name] = {"perplexity": quality.perplexity(mean), "nll_seconds": spent}
        digests = [engine.logits_sha256(windows[0]) for _ in range(2)]
        found[name] |= {"logits_sha256": digests[0][:16], "repeatable": digests[0] == digests[1]}
    return found


if __name__ == "__main__":
    main()
