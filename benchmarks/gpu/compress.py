"""Seconds and peak memory of what compression is made of: calibration, choices, repair, GPTQ, building, on one model.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/gpu/compress.py DIRECTORY [--device cuda] [--tokens N] [--json FILE]

On random tokens, in three domains, of which --fitted are windows that `stream` and `kl` read too. What is built is
written to --work and deleted again. "own" is the process's peak main memory above what it held when the step began.
"""

import argparse
import cProfile
import dataclasses
import gc
import json
import pathlib
import pstats
import re
import shutil
import time

import torch

from compressors import build
from compressors.distillation import repair as distillation
from compressors.model import family
from compressors.model.checkpoint import Checkpoint
from compressors.model.model_directory import WEIGHTS
from compressors.plan import CompressionPlan
from compressors.statistics import activations, second_moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--fitted", type=int, default=24, help="windows of each domain")
    parser.add_argument("--distilled", type=int, default=262144, help="tokens that a distillation learns from")
    parser.add_argument("--vocabulary", type=int, default=8000, help="token ids are below it")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("outputs/benchmark"))
    parser.add_argument("--only", nargs="+", help="steps, by the beginning of their names")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--profile", type=pathlib.Path, help="directory for a cProfile of each step")
    arguments = parser.parse_args()

    base = Checkpoint.read(arguments.checkpoint)
    kind, own, device = family.family_of(base), CompressionPlan.identity(base.config), arguments.device
    each = arguments.tokens // (3 * arguments.window)
    domains = {name: random_windows(arguments, each, seed) for seed, name in enumerate("abc")}
    fitted = {name: windows[: arguments.fitted] for name, windows in domains.items()}
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = []

    def step(name, function):  # type: ignore[no-untyped-def]
        if arguments.only and not any(name.startswith(wanted) for wanted in arguments.only):
            return None
        before = start(device)
        profiler = cProfile.Profile() if arguments.profile else None
        began = time.monotonic()
        made = profiler.runcall(function) if profiler else function()
        if device == "cuda":
            torch.cuda.synchronize()
        row = {"step": name, "seconds": time.monotonic() - began, **peaks(device, before)}
        rows.append(row)
        if profiler:
            arguments.profile.mkdir(parents=True, exist_ok=True)
            with (arguments.profile / f"{len(rows)}.txt").open("w") as file:
                file.write(name)
                pstats.Stats(profiler, stream=file).sort_stats("tottime").print_stats(30)
        gpu = f"{row['gpu_gb']:>8.2f}" if "gpu_gb" in row else ""
        print(f"{name:<64}{row['seconds']:>8.2f} s{row['host_gb']:>8.2f}{gpu}", flush=True)
        return made

    print(f"{'step':<64}{'':>10}{'own GB':>8}{'GPU GB' if device == 'cuda' else '':>8}")
    step("read the model", lambda: [tensor.load().sum() for tensor in base.tensors.values()])
    statistics = activations.calibrate(base, [window for those in fitted.values() for window in those], device)
    step(
        f"activation statistics, {3 * arguments.fitted * arguments.window:,} tokens",
        lambda: activations.calibrate(base, [window for those in fitted.values() for window in those], device),
    )
    step(
        f"second moments, {3 * each * arguments.window:,} tokens",
        lambda: second_moments.collect(base, domains, arguments.work / "all", device),
    )
    # `stream` and `kl` read the windows of the moments again: those of a study are fewer
    there = arguments.work / "all"
    few = second_moments.collect(base, fitted, there if fitted == domains else arguments.work / "fitted", device)
    all_of_them = second_moments.opened(there) if there.is_dir() else few

    def built(name, changes, moment=all_of_them):  # type: ignore[no-untyped-def]
        plan = dataclasses.replace(own, **changes)

        def write() -> None:
            build.apply(plan, base, kind, statistics, moments=moment, device=device).write(arguments.work / "made")

        step(name, write)
        shutil.rmtree(arguments.work / "made", ignore_errors=True)

    width = own.intermediate_size * 7 // 8 // 64 * 64
    groups = own.num_key_value_heads * 3 // 4 or 1
    heads = groups * (own.num_attention_heads // own.num_key_value_heads)
    cut = {"intermediate_size": width, "num_attention_heads": heads, "num_key_value_heads": groups}
    what = f"FFN {width}, {heads}/{groups} heads"
    read = f"{3 * arguments.fitted * arguments.window:,} tokens"
    built(f"build {what}", cut)
    built(f"build {what}, flap", {**cut, "importance": "flap"})
    built(f"build {what}, energy + ridge", {**cut, "importance": "energy", "repair": "ridge"})
    built(f"build {what}, energy + stream ({read})", {**cut, "importance": "energy", "repair": "stream"}, few)
    count = arguments.distilled // 3 // arguments.window
    lessons = {name: random_windows(arguments, count, 3 + seed) for seed, name in enumerate(fitted)}
    learnt = 3 * count * arguments.window
    distillation.TOKENS = distillation.TOKENS_ON_GPU = learnt
    taught = dataclasses.replace(few, more=lambda: lessons)
    distilled = {**cut, "importance": "energy", "repair": "distill"}
    built(f"build {what}, energy + distill ({learnt:,} tokens)", distilled, taught)
    built("build W8A8, nearest", {"precision": "W8A8"})
    built("build FP8_DYNAMIC, nearest", {"precision": "FP8_DYNAMIC"})
    built("build W4A16, nearest", {"precision": "W4A16", "group_size": 64})
    built("build W4A16, GPTQ", {"precision": "W4A16", "group_size": 64, "quantizer": "gptq"})
    built("build W8A8, GPTQ", {"precision": "W8A8", "quantizer": "gptq"})
    smooth = {"precision": "W8A8", "smoothing": "smoothquant"}
    built("build W8A8, nearest, smoothquant", smooth)
    built("build W8A8, GPTQ, smoothquant", {**smooth, "quantizer": "gptq"})
    narrow = own.hidden_size * 7 // 8 // own.num_attention_heads * own.num_attention_heads
    turned = {"hidden_size": narrow, "rotation": "pca"}
    built(f"build hidden {narrow}, pca", turned, few)
    built(f"build hidden {narrow}, pca + stream ({read})", {**turned, "repair": "stream"}, few)
    built(f"build hidden {narrow}, pca, W8A8 by GPTQ", {**turned, "precision": "W8A8", "quantizer": "gptq"}, few)
    less = own.num_hidden_layers - max(1, own.num_hidden_layers // 15)
    built(f"build {less} layers, kl", {"num_hidden_layers": less, "drop_from": "kl"}, few)
    built(f"build {less} layers, kl + stream", {"num_hidden_layers": less, "drop_from": "kl", "repair": "stream"}, few)
    copy = arguments.work / "copy"
    step("plain copy of the model", lambda: shutil.copyfile(arguments.checkpoint / WEIGHTS, copy))
    copy.unlink(missing_ok=True)
    size = sum(file.stat().st_size for file in arguments.work.glob("all/*"))
    print(f"second moments on disk: {size / 1e9:.2f} GB")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def random_windows(arguments: argparse.Namespace, count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, arguments.vocabulary, (count, arguments.window), generator=generator).tolist()


def start(device: str) -> int:
    """Forget the peaks so far; the main memory that is held now, in bytes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM
    return held("RssAnon")


def peaks(device: str, before: int) -> dict[str, float]:
    """VmHWM counts the mapped model file too, which the kernel may drop: that share of it is taken off."""
    found = {"host_gb": (held("VmHWM") - held("RssFile") - before) / 1e9}
    if device == "cuda":
        found["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def held(name: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
