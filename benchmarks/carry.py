"""What a repair is worth on kinds of text that calibration did not hold, by calibration text and number of windows.

    PYTHONPATH=. python benchmarks/carry.py [--model DIRECTORY] [--own DIRECTORY] --fit embedded own embedded+own …

Judged in domain (the embedded search text) and on the five kinds of `left_out_texts`, in float32. PerfNorm is exp of
the difference of the mean losses, its error and that of the KL divergence are over windows; "out" is the mean over kinds.
--own holds .jsonl files of text that the model wrote, each a domain.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import time

import left_out_texts
import repair
import torch
from transformers import AutoTokenizer

from compressors import build
from compressors.model import family
from compressors.model.checkpoint import Checkpoint
from compressors.plan import CompressionPlan
from compressors.statistics import activations, second_moments
from evaluator import embedded_texts, quality, shared_text, texts
from search import files
from search.setup import machine, sources

HOWS = {**repair.HOW, **repair.DEPTH, **repair.HIDDEN, "none": {}}
WHOLE = {"W4A16": {"precision": "W4A16", "quantizer": "gptq", "group_size": 64}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=sources.EMBEDDED)
    parser.add_argument("--packages", type=pathlib.Path, default=pathlib.Path("outputs/packages"))
    parser.add_argument("--own", type=pathlib.Path)
    parser.add_argument("--fit", nargs="+", default=["embedded"], help="calibration texts, joined by +")
    parser.add_argument("--windows", type=int, nargs="+", default=[32], help="of each domain")
    parser.add_argument("--cuts", nargs="+", default=["FFN 1152"])
    parser.add_argument("--how", nargs="+", default=["energy, stream"])
    parser.add_argument("--tokens", type=int, default=8192, help="in domain")
    parser.add_argument("--left-out-tokens", type=int, default=4096, help="of each kind")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--plans", type=json.loads, default={**repair.SMOLLM2, **WHOLE})
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("outputs/benchmark"))
    parser.add_argument("--json", type=pathlib.Path, help="a line for each row is appended to it")
    arguments = parser.parse_args()

    path = sources.resolve(arguments.model, files.CACHE)
    base = Checkpoint.read(path)
    kind, own = family.family_of(base), CompressionPlan.identity(base.config)
    tokenizer, device = AutoTokenizer.from_pretrained(path), machine.best_device()
    mixes = {fit: calibration(fit, arguments.own) for fit in arguments.fit}
    left_out = left_out_texts.read(arguments.packages)
    for documents in left_out.values():
        for domain, those in mixes[arguments.fit[0]].items():
            assert not shared_text.compare(those, documents).characters, domain
    judged = {"in": shards_of(tokenizer, texts.split(embedded_texts.documents())[1], arguments.tokens, arguments.window)}
    for name, documents in left_out.items():
        judged[name] = shards_of(tokenizer, documents, arguments.left_out_tokens, arguments.window)
    model = base.to_model(device, torch.float32)
    reference = {name: quality.Reference.of(model, those, max_bytes=1 << 34) for name, those in judged.items()}
    print("base perplexity: " + ", ".join(f"{name} {perplexity(one):.1f}" for name, one in reference.items()), flush=True)
    del model
    for fit, domains in mixes.items():
        for count in arguments.windows:
            windows = {
                name: texts.windows(tokenizer, documents, arguments.window, count) for name, documents in domains.items()
            }
            digest = texts.text_digest([window for those in windows.values() for window in those])
            place = arguments.work / f"moments-{base.digest()[:8]}-{digest}"
            began = time.monotonic()
            moments = second_moments.collect(base, windows, place, device)
            collected = time.monotonic() - began
            statistics = activations.calibrate(base, [window for those in windows.values() for window in those][::4], device)
            for cut in arguments.cuts:
                for how in arguments.how:
                    plan = dataclasses.replace(own, **arguments.plans[cut], **HOWS[how])
                    began = time.monotonic()
                    made = build.apply(plan, base, kind, statistics, moments=moments, simulate=True, device=device)
                    made = made.to_model(device, torch.float32)
                    row = {"fit": fit, "windows": count, "cut": cut, "how": how, "moments s": collected}
                    row["s"] = time.monotonic() - began
                    found = {name: repair.judge(made, those, reference[name]) for name, those in judged.items()}
                    report({**row, "judged": found}, arguments.json)


def calibration(fit: str, directory: pathlib.Path | None) -> dict[str, list[texts.Document]]:
    domains: dict[str, list[texts.Document]] = {}
    for part in fit.split("+"):
        if part == "embedded":
            domains |= embedded_texts.domains()
        else:
            assert directory is not None
            found = sorted(directory.glob("*.jsonl")) if part == "own" else [directory / f"{part}.jsonl"]
            domains |= {f"own-{file.stem}": texts.read_documents([file]) for file in found}
    return domains


def shards_of(tokenizer, documents, tokens, window):  # type: ignore[no-untyped-def]
    return [[one] for one in texts.windows(tokenizer, documents, window, tokens // window)]


def perplexity(reference) -> float:  # type: ignore[no-untyped-def]
    return math.exp(sum(reference.nll) / len(reference.nll))


def mean_of(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the mean over kinds; their errors are independent."""
    count = len(found)
    means = {key: sum(one[key] for one in found.values()) / count for key in ("perf", "kl")}
    return means | {key: math.hypot(*(one[key] for one in found.values())) / count for key in ("perf_se", "kl_se")}


def report(row: dict, file: pathlib.Path | None) -> None:
    found = row["judged"]
    out = mean_of({name: one for name, one in found.items() if name != "in"})
    shown = "  ".join(
        f"{name} {one['perf']:.3f}±{one['perf_se']:.3f} {one['kl']:.3f}±{one['kl_se']:.3f}"
        for name, one in {"in": found["in"], "OUT": out}.items()
    )
    each = " ".join(f"{name} {one['perf']:.3f}/{one['kl']:.3f}" for name, one in found.items() if name != "in")
    print(f"{row['cut']} | {row['how']} | {row['fit']} {row['windows']} | {shown} | {each} | {row['s']:.0f} s", flush=True)
    if file is not None:
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
