"""What a repair is worth on text that calibration did not hold, by calibration text and number of windows.

    PYTHONPATH=. python benchmarks/carry.py [--model DIRECTORY] --fit embedded self embedded+self FILE+self …

Judged in domain (the embedded search text, or --same FILE) and on the five kinds of `left_out_texts` (or --other
FILES), in float32. PerfNorm is exp of the difference of the mean losses, its error and that of the KL divergence are
over windows; OUT is the mean over the other kinds. With --half, both models are run in bfloat16 while something is
fitted, as they are on a GPU.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable

import left_out_texts
import repair
import torch
from transformers import AutoTokenizer

from compressors import build
from compressors.distillation import repair as distillation
from compressors.methods import stream
from compressors.model import family
from compressors.model.checkpoint import Checkpoint
from compressors.plan import CompressionPlan
from compressors.statistics import activations, second_moments
from evaluator import backends, embedded_texts, quality, shared_text, texts
from evaluator.backends import EngineSettings
from search import files
from search.setup import machine, own_text, sources
from search.setup.texts import DistillationText

WHOLE = {"W4A16": {"precision": "W4A16", "quantizer": "gptq", "group_size": 64}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=sources.EMBEDDED)
    parser.add_argument("--packages", type=pathlib.Path, default=pathlib.Path("outputs/packages"))
    parser.add_argument("--same", type=pathlib.Path)
    parser.add_argument("--other", type=pathlib.Path, nargs="+")
    parser.add_argument("--kinds", nargs="+", default=left_out_texts.KINDS)
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--fit", nargs="+", default=["embedded"], help="calibration texts, joined by +")
    parser.add_argument("--windows", type=int, nargs="+", default=[32], help="of each domain, or what it has")
    parser.add_argument("--cuts", nargs="+", default=["FFN 1152"])
    parser.add_argument("--how", nargs="+", default=["energy, stream"], help="each for the cuts that know it")
    parser.add_argument("--tokens", type=int, default=8192, help="in domain")
    parser.add_argument("--left-out-tokens", type=int, default=4096, help="of each kind")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--distill-tokens", type=int, help="[default: the shipped number on this device]")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=distillation.RATES, help="of learning, over the typical weight"
    )
    parser.add_argument("--plans", type=json.loads, default={**repair.SMOLLM2, **WHOLE})
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("outputs/benchmark"))
    parser.add_argument("--json", type=pathlib.Path, help="a line for each row is appended to it")
    arguments = parser.parse_args()

    unknown = set(arguments.how).difference(*(choices(arguments.plans[cut]) for cut in arguments.cuts))
    if unknown:
        parser.error(f"--how: {', '.join(sorted(unknown))}: no cut knows it")
    path = sources.resolve(arguments.model, files.CACHE)
    base = Checkpoint.read(path)
    kind, identity = family.family_of(base), CompressionPlan.identity(base.config)
    tokenizer, device = AutoTokenizer.from_pretrained(path), machine.best_device()
    distillation.RATES = tuple(arguments.rates)
    if arguments.distill_tokens is not None:
        distillation.TOKENS = distillation.TOKENS_ON_GPU = arguments.distill_tokens
    if arguments.half:
        second_moments.compute_dtype = stream.compute_dtype = lambda device: torch.bfloat16
        plain = distillation.settings
        distillation.settings = lambda *given: dataclasses.replace(plain(*given), dtype="bfloat16")
    writers = ("transformers",) if backends.unavailable("vllm") else ("vllm", "transformers")
    writer = own_text.Writer(
        path, base.digest(), tokenizer, arguments.work, writers, EngineSettings(device), repair.say
    )
    own = own_text.OwnText(writer.domains, tokenizer, arguments.window, max(arguments.windows))
    mixes = {fit: calibration(fit, own.fitted) for fit in arguments.fit}
    if arguments.other:
        left_out = {file.stem: texts.read_documents([file]) for file in arguments.other}
    else:
        every = left_out_texts.read(arguments.packages)
        left_out = {name: every[name] for name in arguments.kinds}
    same = texts.read_documents([arguments.same]) if arguments.same else texts.split(embedded_texts.documents())[1]
    for documents in left_out.values():
        for domain, those in mixes[arguments.fit[0]].items():
            assert not shared_text.compare(those, documents).characters, domain
    judged = {"in": shards_of(tokenizer, same, arguments.tokens, arguments.window)}
    for name, documents in left_out.items():
        judged[name] = shards_of(tokenizer, documents, arguments.left_out_tokens, arguments.window)
    model = base.to_model(device, torch.float32)
    reference = {name: quality.Reference.of(model, those, max_bytes=1 << 34) for name, those in judged.items()}
    print(
        "base perplexity: " + ", ".join(f"{name} {perplexity(one):.1f}" for name, one in reference.items()), flush=True
    )
    del model
    for fit, domains in mixes.items():
        for count in arguments.windows:
            windows = {
                name: texts.windows(tokenizer, documents, arguments.window, count, or_fewer=True)
                for name, documents in domains.items()
            }
            place = repair.place_of_moments(arguments.work, base, windows)
            began = time.monotonic()
            moments = second_moments.collect(base, windows, place, device)
            collected = time.monotonic() - began
            moments = dataclasses.replace(moments, more=functools.partial(lessons, fit, own))
            statistics = activations.calibrate(
                base, [window for those in windows.values() for window in those][::4], device
            )
            for cut in arguments.cuts:
                for how in filter(choices(arguments.plans[cut]).__contains__, arguments.how):
                    plan = dataclasses.replace(identity, **arguments.plans[cut], **choices(arguments.plans[cut])[how])
                    began = time.monotonic()
                    made = build.apply(plan, base, kind, statistics, moments=moments, simulate=True, device=device)
                    made = made.to_model(device, torch.float32)
                    row = {"fit": fit, "windows": count, "cut": cut, "how": how, "moments s": collected}
                    row["s"] = time.monotonic() - began
                    found = {name: repair.judge(made, those, reference[name]) for name, those in judged.items()}
                    report({**row, "judged": found}, arguments.json)


def choices(cut: dict) -> dict[str, dict]:
    """Return the choices that `repair` names for a cut of this dimension; of what cuts nothing the scales can learn."""
    if "precision" in cut:
        return {"none": {}, "distill": {"repair": "distill"}}
    dimension = repair.DEPTH if "num_hidden_layers" in cut else repair.HIDDEN if "hidden_size" in cut else repair.HOW
    return {**dimension, "none": {}}


def calibration(fit: str, own: Callable[[], dict[str, list[texts.Document]]]) -> dict[str, list[texts.Document]]:
    domains: dict[str, list[texts.Document]] = {}
    for part in fit.split("+"):
        if part == "embedded":
            domains |= embedded_texts.domains()
        elif part == "self":
            domains |= own()
        else:
            domains[pathlib.Path(part).stem] = texts.read_documents([part])
    return domains


def lessons(fit: str, own: own_text.OwnText) -> dict[str, list[list[int]]]:
    """Return what a distillation learns from."""
    given = calibration(fit, dict)
    writes = own.at_least if "self" in fit.split("+") else lambda windows: {}
    return DistillationText(
        given, writes, own.tokenizer, own.window, distillation.tokens_on(machine.best_device())
    ).windows


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
    print(
        f"{row['cut']} | {row['how']} | {row['fit']} {row['windows']} | {shown} | {each} | {row['s']:.0f} s", flush=True
    )
    if file is not None:
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
