"""What each cut loses, unrepaired and repaired, in the calibration's own domain and in one that it did not hold.

    PYTHONPATH=. python benchmarks/repair.py [--model DIRECTORY] [--other FILE] [--only CUT …] [--how WHICH …]

Calibrated on `evaluator.embedded_texts.domains` (or --calibration FILES), judged on the embedded search text (or --same
FILE) and on --other, by default the embedded report text. PerfNorm is exp of the difference of the mean losses; its
error and that of the KL divergence are over windows. --plans names the cuts; what is fitted is kept in --work, and a
second call judges alone.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
import time

import torch
from transformers import AutoTokenizer

from compressors import build
from compressors.files import digest_of_json
from compressors.model import family
from compressors.model.checkpoint import Checkpoint
from compressors.plan import CompressionPlan
from compressors.statistics import activations, second_moments
from evaluator import embedded_texts, quality, score, shared_text, texts
from search import files
from search.setup import machine, sources

SMOLLM2 = {
    "FFN 1152": {"intermediate_size": 1152},
    "FFN 1344": {"intermediate_size": 1344},
    "2 of 3 key/value groups": {"num_key_value_heads": 2, "num_attention_heads": 6},
    "hidden 513": {"hidden_size": 513},  # a multiple of its 9 heads, as transformers wants it
    "28 layers": {"num_hidden_layers": 28},
}
HOW = {
    "activation": {},
    "energy": {"importance": "energy"},
    "flap": {"importance": "flap"},
    "obs": {"importance": "obs"},
    "activation, ridge": {"repair": "ridge"},
    "activation, stream": {"repair": "stream"},
    "flap, ridge": {"importance": "flap", "repair": "ridge"},
    "obs, ridge": {"importance": "obs", "repair": "ridge"},
    "energy, ridge": {"importance": "energy", "repair": "ridge"},
    "energy, stream": {"importance": "energy", "repair": "stream"},
    "energy, distill": {"importance": "energy", "repair": "distill"},
    "flap, stream": {"importance": "flap", "repair": "stream"},
    "obs, stream": {"importance": "obs", "repair": "stream"},
    "kl": {"importance": "kl"},  # of key/value groups
    "kl, stream": {"importance": "kl", "repair": "stream"},
    "kl, distill": {"importance": "kl", "repair": "distill"},
}
HIDDEN = {
    "activity": {},
    "stream": {"repair": "stream"},
    "pca": {"rotation": "pca"},
    "pca, ridge": {"rotation": "pca", "repair": "ridge"},
    "pca, stream": {"rotation": "pca", "repair": "stream"},
    "pca, distill": {"rotation": "pca", "repair": "distill"},
}
DEPTH = {
    "top": {"drop_from": "top"},
    "block influence": {},
    "block influence, stream": {"repair": "stream"},
    "kl": {"drop_from": "kl"},
    "kl, stream": {"drop_from": "kl", "repair": "stream"},
    "kl, distill": {"drop_from": "kl", "repair": "distill"},
    "kl-look-ahead": {"drop_from": "kl-look-ahead"},
    "kl-look-ahead, stream": {"drop_from": "kl-look-ahead", "repair": "stream"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=sources.EMBEDDED)
    parser.add_argument("--calibration", type=pathlib.Path, nargs="+")
    parser.add_argument("--same", type=pathlib.Path)
    parser.add_argument("--other", type=pathlib.Path)
    parser.add_argument("--windows", type=int, default=64, help="of each domain, to fit on")
    parser.add_argument("--tokens", type=int, default=16384, help="of each judged text")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--only", nargs="+", help="cuts, by their names")
    parser.add_argument("--how", nargs="+", help="of the choices and repairs, by their names")
    parser.add_argument("--plans", type=json.loads, default=SMOLLM2, help="name → what differs from the base model")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("outputs/benchmark"))
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()

    path = sources.resolve(arguments.model, files.CACHE)
    base = Checkpoint.read(path)
    kind = family.family_of(base)
    own = CompressionPlan.identity(base.config)
    tokenizer = AutoTokenizer.from_pretrained(path)
    device = machine.best_device()

    domains = embedded_texts.domains()
    if arguments.calibration:
        domains = {file.stem: texts.read_documents([file]) for file in arguments.calibration}
    windows = {
        name: texts.windows(tokenizer, documents, arguments.window, arguments.windows)
        for name, documents in domains.items()
    }
    judged = {
        "same": texts.read_documents([arguments.same])
        if arguments.same
        else texts.split(embedded_texts.documents())[1],
        "other": texts.read_documents([arguments.other]) if arguments.other else embedded_texts.report_documents(),
    }
    for name, documents in judged.items():
        for domain, those in domains.items():
            assert not shared_text.compare(those, documents).characters, (domain, name)
    shards = {
        name: [[w] for w in texts.windows(tokenizer, documents, arguments.window, arguments.tokens // arguments.window)]
        for name, documents in judged.items()
    }
    started = time.monotonic()
    moment = second_moments.collect(base, windows, place_of_moments(arguments.work, base, windows), device)
    print(f"second moments: {time.monotonic() - started:.0f} s", flush=True)
    statistics = activations.calibrate(base, [window for those in windows.values() for window in those], device)
    model = base.to_model(device, torch.float32)
    reference = {name: quality.Reference.of(model, those, max_bytes=1 << 34) for name, those in shards.items()}
    del model

    rows = []
    print(f"{'cut':<26}{'choice and repair':<22}" + "".join(f"{n + ' PerfNorm':>18}{'KL':>16}" for n in shards))
    for cut, changes in arguments.plans.items():
        for how, options in (
            DEPTH if "num_hidden_layers" in changes else HIDDEN if "hidden_size" in changes else HOW
        ).items():
            if cut not in (arguments.only or [cut]) or how not in (arguments.how or [how]):
                continue
            plan = dataclasses.replace(own, **changes, **options)
            started = time.monotonic()
            made = build.apply(plan, base, kind, statistics, moments=moment, simulate=True, device=device, say=say)
            made = made.to_model(device, torch.float32)
            built = time.monotonic() - started
            row = {"cut": cut, "how": how, "seconds": built}
            for name, those in shards.items():
                row |= {f"{name} {key}": value for key, value in judge(made, those, reference[name]).items()}
            rows.append(row)
            print(
                f"{cut:<26}{how:<22}" + "".join(columns(row, name) for name in shards) + f"{built:>6.0f} s", flush=True
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def place_of_moments(work: pathlib.Path, base: Checkpoint, windows: dict[str, list[list[int]]]) -> pathlib.Path:
    """Return the directory for the second moments of a model on these windows, by what decides them."""
    text = texts.text_digest([window for those in windows.values() for window in those])
    digest = digest_of_json([text, *second_moments.weighting(family.family_of(base))], 16)
    return work / f"moments-{base.digest()[:8]}-{digest}"


def say(what: str) -> None:
    print(f"{time.strftime('%T')} {what}", file=sys.stderr, flush=True)


def columns(row: dict, name: str) -> str:
    perf, perf_se, kl, kl_se = (row[f"{name} {key}"] for key in ("perf", "perf_se", "kl", "kl_se"))
    return f"{perf:>10.3f}±{perf_se:.3f} {kl:>9.3f}±{kl_se:.3f}"


def judge(model, shards, reference) -> dict:  # type: ignore[no-untyped-def]
    found = [quality.shard_quality(model, shard, reference, index) for index, shard in enumerate(shards)]
    gain = [base - one.nll for base, one in zip(reference.nll, found, strict=True)]
    perf, kl = math.exp(sum(gain) / len(gain)), [one.kl for one in found]
    return {
        "perf": perf,
        "perf_se": perf * score.standard_error(gain),
        "kl": sum(kl) / len(kl),
        "kl_se": score.standard_error(kl),
    }


if __name__ == "__main__":
    main()
