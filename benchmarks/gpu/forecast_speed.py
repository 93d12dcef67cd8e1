"""Compare the speed table's forecast with measured time ratios, for models without weights.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/gpu/forecast_speed.py OUT --tokenizer DIRECTORY [--models NAME ...]

Time depends on shapes and kernels alone, so the weight files are hollow: they hold zeros. The table is made as `run`
makes it; then plans that it has not seen are drawn from the space and timed in turn with the base model.
"""

import argparse
import contextlib
import cProfile
import dataclasses
import json
import pathlib
import pstats
import random
import shutil
import statistics
import time

from benchmarks.hollow import hollow
from compressors import build
from compressors.plan import CompressionPlan, short
from evaluator import speed
from search.config import compose
from search.setup import setting as settings
from search.stages import damage_table, speed_table
from search.stages.engines import Engines
from search.stages.screen import Screener
from search.stages.side_by_side import SideBySide, fitting
from search.study.space import shareable

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "head_dim": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "use_sliding_window": False,
        "dtype": "bfloat16",
        "hidden_act": "silu",
    },
    "exaone4-1.2b": {
        "model_type": "exaone4",
        "architectures": ["Exaone4ForCausalLM"],
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "sliding_window_pattern": None,
        "layer_types": ["full_attention"] * 30,
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192},
        "dtype": "bfloat16",
        "hidden_act": "silu",
    },
    "llama-8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "dtype": "bfloat16",
        "hidden_act": "silu",
    },
}
SPACES = {
    "qwen2.5-1.5b": {
        "num_hidden_layers": "{low: 20, high: 28}",
        "num_key_value_heads": "{low: 1, high: 2}",
        "num_attention_heads": "{low: 5, high: 12}",
        "hidden_size": "{low: 1280, high: 1536, step: 128}",
        "intermediate_size": "{low: 6144, high: 8960, step: 256}",
    },
    "exaone4-1.2b": {
        "num_hidden_layers": "{low: 20, high: 30}",
        "num_key_value_heads": "{low: 6, high: 8}",
        "num_attention_heads": "{low: 18, high: 32}",
        "hidden_size": "{low: 1792, high: 2048, step: 128}",
        "intermediate_size": "{low: 3072, high: 4096, step: 128}",
    },
    "llama-8b": {
        "num_hidden_layers": "{low: 24, high: 32}",
        "num_key_value_heads": "{low: 6, high: 8}",
        "num_attention_heads": "{low: 24, high: 32}",
        "hidden_size": "{low: 3584, high: 4096, step: 256}",
        "intermediate_size": "{low: 10240, high: 14336, step: 512}",
    },
}
MODELS["tiny"] = MODELS["llama-8b"] | {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}  # to try this script on a small machine
SPACES["tiny"] = {
    "num_hidden_layers": "{low: 5, high: 8}",
    "num_key_value_heads": "{low: 1, high: 2}",
    "num_attention_heads": "{low: 2, high: 4}",
    "hidden_size": "{low: 128, high: 256, step: 128}",
    "intermediate_size": "{low: 256, high: 512, step: 128}",
}
PRECISIONS = ("bfloat16", "W8A8", "FP8_DYNAMIC", "W4A16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--tokenizer", type=pathlib.Path, help="of the models without weights")
    parser.add_argument("--study", help="a study file, in place of models without weights")
    parser.add_argument("--config-dir", type=pathlib.Path)
    parser.add_argument("--models", nargs="+", default=["qwen2.5-1.5b", "exaone4-1.2b", "llama-8b"])
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path("/tmp/forecast-speed"))
    parser.add_argument("--profile", type=pathlib.Path, help="make the damage table too, of random weights, profiled")
    parser.add_argument("--words", nargs="*", default=[], help="KEY=VALUE for the study file")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.study:
        of_study(arguments)
        return
    for name in arguments.models:
        one(name, arguments)


def of_study(arguments: argparse.Namespace) -> None:
    """Compare for the model of a study file, whose tables are made if they are missing."""
    file = compose.load(arguments.study, arguments.words, arguments.config_dir)
    setting = settings.prepare(file, lambda text: print("…", text, flush=True))
    with Engines(setting) as engines:
        compared(file.study_name, setting, engines, arguments)


def one(name: str, arguments: argparse.Namespace) -> None:
    shutil.rmtree(arguments.scratch / name, ignore_errors=True)
    path = arguments.scratch / name / "model"
    started = time.monotonic()
    hollow(path, MODELS[name], weights=bool(arguments.profile))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(arguments.tokenizer / file, path / file)
    words = [
        f"model.source={path}",
        f"study_name={name}",
        f"outputs={arguments.scratch / name / 'outputs'}",
        "space=precision",
        f"space.precision=[{','.join(PRECISIONS)}]",
        "export.for_transformers=null",
        "tracking.mlflow=false",
        "text.window=64",
        "text.shards=2",
        "evaluation=vllm",
        *(f"space.{key}={value}" for key, value in SPACES[name].items()),
        *arguments.words,
    ]
    file = compose.load("demo", words)
    setting = settings.prepare(file, lambda text: print("…", text, flush=True))
    print(f"{name}: prepared in {time.monotonic() - started:.0f} s on {setting.machine.device_name}", flush=True)
    with Engines(setting) as engines:
        began = time.monotonic()
        engines.baseline()
        print(f"{name}: baseline ready after {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        table = speed_table.speed_table(setting, engines, lambda text: print("…", text, flush=True))
        print(f"{name}: table of {len(table.probes)} probes in {time.monotonic() - began:.0f} s; ms: {table.base_ms}")
        for size in table.base_ms:
            print(f"  batch {size}: error {table.error(size):.4f}")
            for precision in PRECISIONS:
                shape = dataclasses.replace(table.base, precision=precision)
                parts = dataclasses.asdict(table.parts(shape, size))
                print(f"    {precision:12s}", {part: round(value, 3) for part, value in parts.items()})
        if arguments.profile:
            profile_damage(setting, arguments.profile)
        compared(name, setting, engines, arguments)
    shutil.rmtree(arguments.scratch / name, ignore_errors=True)


def compared(name: str, setting: settings.Setting, engines: Engines, arguments: argparse.Namespace) -> None:
    """Print and keep the comparison."""
    table = speed_table.speed_table(setting, engines, lambda text: print("…", text, flush=True))
    rows = compare(setting, engines, table, arguments.plans)
    errors = [abs(row["forecast"] - row["measured"]) for row in rows]
    print(f"{name}: {len(rows)} plans, median error {statistics.median(errors):.4f}, largest {max(errors):.4f}")
    (arguments.out / f"{name}.json").write_text(json.dumps({"table": table.to_dict(), "plans": rows}, indent=1))


def profile_damage(setting: settings.Setting, path: pathlib.Path) -> None:
    """Make the damage table under cProfile."""
    profiler = cProfile.Profile()
    started = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        profiler.runcall(
            damage_table.damage_table,
            setting,
            Screener(setting),
            lambda text: print(f"… {time.monotonic() - started:6.1f} s {text}", flush=True),
        )
    print(f"damage table in {time.monotonic() - started:.0f} s")
    with path.open("w") as file:
        pstats.Stats(profiler, stream=file).sort_stats("cumulative").print_stats(70)


def compare(setting: settings.Setting, engines: Engines, table, plans: int) -> list[dict]:
    """Draw plans from the space, each precision in turn, and time them in turn with the base model."""
    drawn = random.Random(0)
    own, space = setting.model.identity, setting.file.space
    precisions = space.precision
    chosen: list[CompressionPlan] = []
    while len(chosen) < plans:
        values = {
            key: drawn.randrange(getattr(space, key).low, getattr(space, key).high + 1, getattr(space, key).step)
            for key in ("num_hidden_layers", "num_key_value_heads", "num_attention_heads", "hidden_size",
                        "intermediate_size")
        }  # fmt: skip
        plan = dataclasses.replace(own, **values, precision=precisions[len(chosen) % len(precisions)])
        plan = dataclasses.replace(
            plan, num_attention_heads=shareable(plan.num_attention_heads, plan.num_key_value_heads, own)
        )
        if build.check(plan, setting.model.checkpoint, setting.model.family, kernels=setting.kernels) is None:
            chosen.append(plan)
    rows = []
    workload = setting.workload
    engines.baseline()
    while chosen:
        group = chosen[: max(1, fitting(setting, chosen))]
        chosen = chosen[len(group) :]
        with SideBySide(setting, engines, group) as side_by_side:
            running = side_by_side.ready(print)
            assert all(running)
            base, *turns = speed.collect_all([engines.baseline(), *running], workload)
        for plan, own_turns in zip(group, turns, strict=True):
            timing = speed.estimate(own_turns, base)
            forecast, error = table.time_ratio(speed_table.shape_of(setting, plan))
            rows.append({"plan": short(plan), "forecast": forecast, "forecast_se": error,
                         "measured": timing.time_ratio, "measured_se": timing.time_ratio_se})  # fmt: skip
            print(f"  {short(plan):58s} forecast {forecast:.4f} ± {error:.4f}, measured {timing.time_ratio:.4f} ± "
                  f"{timing.time_ratio_se:.4f}", flush=True)  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
