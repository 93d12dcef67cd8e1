"""Compare what perplexity and what answers say of compressed models: accuracy, lengths and PerfNorm of some plans.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/gpu/answers.py MODEL [--engine vllm|transformers] [--plans JSON] \
        [--only NAME] [--arithmetic 200] [--reading 100] [--work DIRECTORY] [--json FILE] [KEY=VALUE ...]

The plans are W8A8 and W4A16 by GPTQ, and two and four layers fewer by kl with `stream`. --plans takes others, as
{"name": {"num_hidden_layers": 26, "repair": "stream"}}. Questions are those of `benchmarks/questions.py`. Models are
built and measured by the stages of a study; nothing is timed, unless evaluation.speed=measured is among the words. What
is known in --work, an outputs folder, is not made again, so that the script can be continued.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from benchmarks import questions
from compressors.plan import CompressionPlan, canonical
from evaluator import lengths, paired, score
from evaluator.measurement import Measurement
from search.config import compose
from search.errors import UsageError
from search.setup import setting as settings
from search.stages.bench import Bench

MOST = {"arithmetic": 96, "reading": 24}  # tokens of an answer
HEADER = ("model", "task", "accuracy", "difference", "p", "tokens", "ratio", "cut off", "perplexity", "PerfNorm",
          "SpeedNorm")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--engine", default="vllm", choices=("vllm", "transformers"))
    parser.add_argument("--plans", type=json.loads, help="name → what differs from the base model")
    parser.add_argument("--only", action="append", metavar="NAME", help="one of the plans; may be given again")
    parser.add_argument("--arithmetic", type=int, default=200, help="questions; 0: none")
    parser.add_argument("--reading", type=int, default=100, help="questions; 0: none")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("outputs/answers"))
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_intermixed_args()  # words may stand behind options
    began = time.monotonic()

    def say(text: str) -> None:
        if not any(word in text for word in ("shard", "turn ", "block", "layer ")):
            print(f"{time.monotonic() - began:6.0f} s {text}", file=sys.stderr, flush=True)

    with Bench.of(settings.prepare(study(arguments), say, search=False)) as bench:
        try:
            base = bench.baseline(say)
        except UsageError as error:  # few questions, of which it answers none
            sys.exit(str(error))
        found = {"base model": base}
        show(header=True)
        show("base model", base, base)
        plans = arguments.plans or default_plans(bench.setting.model.identity)
        for name, changes in plans.items():
            if arguments.only and name not in arguments.only:
                continue
            found[name] = measured(bench, changes, base, say)
            show(name, found[name], base)
            if arguments.json:
                values = {one: measurement.to_dict() for one, measurement in found.items()}
                arguments.json.write_text(json.dumps({"plans": plans, "measurements": values}) + "\n")
    print(f"{time.monotonic() - began:.0f} s in all")


def study(arguments: argparse.Namespace) -> Any:
    """Return the study file: the tasks, and texts that are larger than the demo's."""
    paths = questions.write(arguments.work / "questions", arguments.arithmetic, arguments.reading)
    perf = [{"metric": "perplexity"}]
    for path in paths:
        if path.stat().st_size:
            perf.append({"metric": "generation", "files": [str(path)], "template": False, "stop": ["\n"],
                         "max_tokens": MOST[path.stem]})  # fmt: skip
    words = [
        "export.for_transformers=null",
        "tracking.mlflow=false",
        "evaluation.speed=predicted",
        "text.window=256",
        "text.shards=16",
        "text.moments_windows=96",
        *arguments.words,
    ]
    options = {
        "model.source": str(arguments.model),
        "evaluation.backend": arguments.engine,
        "evaluation.perf": perf,
        "outputs": str(arguments.work),
        "study_name": "answers",
    }
    return compose.load("demo", words, options=options)


def default_plans(own: CompressionPlan) -> dict[str, dict[str, Any]]:
    """Return the plans of the table, by name: what differs from the base model."""
    layers = [own.num_hidden_layers - fewer for fewer in (2, 4)]
    return {
        "W8A8, gptq": {"precision": "W8A8", "quantizer": "gptq"},
        "W4A16, gptq": {"precision": "W4A16", "quantizer": "gptq"},
        **{f"{left} layers, kl, stream": {"num_hidden_layers": left, "drop_from": "kl", "repair": "stream"}
           for left in layers},
    }  # fmt: skip


def measured(bench: Bench, changes: dict[str, Any], base: Measurement, say: Any) -> Measurement:
    """Build a plan and measure it, as a trial is."""
    own = bench.setting.model.identity
    plan = canonical(dataclasses.replace(own, **changes), own)
    reason = bench.setting.infeasible(plan)
    if reason:
        sys.exit(reason)
    path, weights = bench.build(plan, say)
    return bench.measure(path, weights, base, say)


def show(name: str = "", one: Measurement | None = None, base: Measurement | None = None, header: bool = False) -> None:
    """Print the head of the table, or a model's rows."""
    if header:
        print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
        return
    assert one is not None
    assert base is not None
    result = score.score_of(one, base, score.Formula())
    perf = f"{result.perf_norm:.4f} ± {result.perf_norm_se:.4f}"
    speed = f"{result.speed_norm:+.3f} ± {result.speed_norm_se:.3f}" if one.timed else ""
    for task, own in lengths.answered(one).items():
        its = base.tasks[task]
        assert own.answers is not None
        assert its.answers is not None
        compared = paired.compare(own.correct, its.correct)
        ratio, ratio_se = lengths.ratio(own.answers.tokens, its.answers.tokens)
        cells = (
            *(name, task, f"{own.value:.3f} ± {own.se:.3f}", f"{compared.difference:+.3f} ± {compared.se:.3f}"),
            *(f"{compared.p:.2g}", f"{lengths.of(own.answers.tokens).mean:.1f}", f"{ratio:.2f} ± {ratio_se:.2f}"),
            *(f"{own.answers.cut:.1%}", f"{one.perplexity:.3f}", perf, speed),
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
