"""Confirm the base model against itself, and a plan with fewer layers, again and again: how far the numbers scatter.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/gpu/confirm_aa.py --study NAME --config-dir DIR --layers 26 \
        [--repeats 10] [--pairs 3] [--json FILE] [KEY=VALUE ...]

Every repeat starts its own engine processes, by the code of `optuna-search confirm`. The base model's true Score is
0.5 by definition; a verdict on it is wrong where it says BETTER or WORSE, and FASTER or SLOWER. The plan with fewer
layers is right where it is FASTER. With --json the repeats that the file holds are not taken again, so that the script
can be continued; it ends early where --time SECONDS leaves too little for another repeat.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import shutil
import statistics
import sys
import time
from typing import Any

from search.config import compose
from search.setup import setting as settings
from search.setup.server import require_server
from search.stages import confirm, confirmed
from search.stages.confirmed import Asked, Model, Result

BASE, FEWER = "base model", "fewer layers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--study", required=True)
    parser.add_argument("--config-dir", type=pathlib.Path)
    parser.add_argument("--layers", type=int, help="layers of the plan [default: two less than the base model]")
    parser.add_argument("--drop-from", default="top", help="rule that chooses the layers; kl takes longer to build")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--time", type=float, default=math.inf, help="seconds after which no repeat begins")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    began = time.monotonic()

    file = compose.load(arguments.study, arguments.words, arguments.config_dir)
    setting = settings.prepare(file, say, search=False)
    require_server(file, setting.machine.backend, setting.engine_settings.max_model_len)
    own = setting.model.identity
    layers = arguments.layers or own.num_hidden_layers - 2
    fewer = dataclasses.replace(own, num_hidden_layers=layers, drop_from=arguments.drop_from)
    models = [Model(BASE, own), Model(FEWER, fewer)]
    where = setting.outputs / "confirm-aa"
    found: dict[str, Any] = {"layers": layers, "pairs": arguments.pairs, "repeats": []}
    if arguments.json and arguments.json.is_file():
        found = json.loads(arguments.json.read_text())
    longest = 0.0
    while (number := len(found["repeats"])) < arguments.repeats:
        started = time.monotonic()
        if started - began + longest > arguments.time:
            print(f"time is up after {number} repeats; run it again to continue", file=sys.stderr)
            break
        directory = where / f"{number}"
        shutil.rmtree(directory, ignore_errors=True)
        asked = Asked.of(setting, directory)
        done, failed = confirm.confirm(asked, models, arguments.pairs, say, say)
        if failed:
            sys.exit(f"{failed[0].model.name}: {failed[0].failure}: {failed[0].reason}")
        spent = time.monotonic() - started
        longest = max(longest, spent)
        values = {result.model.name: values_of(asked, result) for result in done}
        found["repeats"].append({"seconds": spent, **values})
        for name, one in values.items():
            print(
                f"{number:3d} {name:13s} Score {one['score']:.4f} ± {one['score_se']:.4f}  SpeedNorm "
                f"{one['speed_norm']:+.4f} ± {one['speed_norm_se']:.4f}  {one['pairs']} pairs "
                f"({one['taken']} taken)  {one['faster']:9s} {one['better']:9s} {spent:5.0f} s",
                flush=True,
            )
        found["summary"] = summary(found["repeats"])
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print()
    for name, value in summary(found["repeats"]).items():
        print(f"{name:45s} {value}")


def values_of(asked: Asked, result: Result) -> dict[str, Any]:
    """Return the numbers of one model in one repeat, with every pair."""
    assert result.ratio is not None
    assert result.faster is not None
    pairs = confirmed.known(asked, result.model.plan).pairs
    return {
        **dataclasses.asdict(result.score),
        "score_half_width": result.score_half,
        "speed_half_width": result.ratio.estimate.half_width,
        "pairs": result.ratio.pairs,
        "taken": len(pairs),
        "between": result.ratio.between,
        "better": result.better.word,
        "faster": result.faster.word,
        "texts": [result.better.text, result.faster.text],
        "notes": list(result.notes),
        "every_pair": [dataclasses.asdict(pair) for pair in pairs],
        "perplexity": result.measurement.perplexity,
    }


def summary(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over the repeats, and how many verdicts were right."""
    found: dict[str, Any] = {"repeats": len(repeats)}
    for name in (BASE, FEWER):
        runs = [repeat[name] for repeat in repeats]
        for key in ("score", "speed_norm"):
            values = [run[key] for run in runs]
            found[f"{name}: {key}, mean"] = round(statistics.fmean(values), 5) if values else None
            found[f"{name}: {key}, standard deviation"] = (
                round(statistics.stdev(values), 5) if len(values) > 1 else None
            )
            if values:
                told = math.sqrt(statistics.fmean(run[f"{key}_se"] ** 2 for run in runs))
                found[f"{name}: {key}, standard error as told"] = round(told, 5)
        if name == BASE:
            found[f"{name}: Score neither BETTER nor WORSE"] = sum(
                run["better"] not in ("BETTER", "WORSE") for run in runs
            )
            found[f"{name}: Score SAME"] = sum(run["better"] == "SAME" for run in runs)
            found[f"{name}: neither FASTER nor SLOWER"] = sum(run["faster"] not in ("FASTER", "SLOWER") for run in runs)
            found[f"{name}: speed SAME"] = sum(run["faster"] == "SAME" for run in runs)
        else:
            found[f"{name}: FASTER"] = sum(run["faster"] == "FASTER" for run in runs)
    found["seconds for each repeat, mean"] = (
        round(statistics.fmean(repeat["seconds"] for repeat in repeats), 1) if repeats else None
    )
    return found


def say(text: str) -> None:
    if "turn" not in text and "shard" not in text:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
