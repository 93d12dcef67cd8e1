"""Computes what the golden tests compare: run as a program, `python tests/golden/compute.py SECTION DIRECTORY`.

In a process of its own, since the arithmetic's instruction set is chosen when torch is loaded: `EXACT` makes sums come
out the same on every processor, but for the last bits of some float32 factors. `stream` chooses between strengths whose
errors may be as close as that, so that its weights have norms and projections, and no digest.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXACT = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
HERE = Path(__file__).parent


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"golden_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLANS: list[tuple[str, str, dict[str, Any]]] = [  # name, family, what differs from the base model
    ("nothing", "llama", {}),
    ("float16", "llama", {"precision": "float16"}),
    ("float32", "llama", {"precision": "float32"}),
    ("depth", "llama", {"num_hidden_layers": 3}),
    ("depth-top", "llama", {"num_hidden_layers": 2, "drop_from": "top"}),
    ("depth-bottom", "llama", {"num_hidden_layers": 3, "drop_from": "bottom"}),
    ("depth-list", "llama", {"num_hidden_layers": 2, "drop_from": "1,2"}),
    ("depth-kl", "llama", {"num_hidden_layers": 3, "drop_from": "kl"}),
    ("depth-look-ahead", "llama", {"num_hidden_layers": 2, "drop_from": "kl-look-ahead", "repair": "stream"}),
    ("depth-ridge", "llama", {"num_hidden_layers": 3, "repair": "ridge"}),
    ("depth-stream", "llama", {"num_hidden_layers": 3, "drop_from": "top", "repair": "stream"}),
    ("heads", "llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ("heads-each", "llama", {"num_attention_heads": 3, "importance": "energy"}),
    ("heads-kl", "llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "importance": "kl"}),
    (
        "heads-obs",
        "llama",
        {"num_attention_heads": 2, "num_key_value_heads": 2, "importance": "obs", "repair": "ridge"},
    ),
    ("ffn", "llama", {"intermediate_size": 128}),
    ("ffn-energy", "llama", {"intermediate_size": 128, "importance": "energy", "repair": "stream"}),
    ("ffn-flap", "llama", {"intermediate_size": 96, "importance": "flap", "repair": "ridge"}),
    ("ffn-obs", "llama", {"intermediate_size": 96, "importance": "obs"}),
    ("ffn-kl", "llama", {"intermediate_size": 128, "importance": "kl"}),
    ("hidden", "llama", {"hidden_size": 72}),
    ("hidden-ridge", "llama", {"hidden_size": 72, "repair": "ridge"}),
    ("hidden-pca", "llama", {"hidden_size": 72, "rotation": "pca"}),
    ("hidden-pca-stream", "llama", {"hidden_size": 72, "rotation": "pca", "repair": "stream"}),
    ("W8A8", "llama", {"precision": "W8A8"}),
    ("W8A8-mse", "llama", {"precision": "W8A8", "quantizer": "mse"}),
    ("W8A8-gptq", "llama", {"precision": "W8A8", "quantizer": "gptq"}),
    ("W8A8-smooth", "llama", {"precision": "W8A8", "smoothing": "smoothquant"}),
    ("W8A8-smooth-gptq", "llama", {"precision": "W8A8", "smoothing": "smoothquant", "quantizer": "gptq"}),
    ("FP8", "llama", {"precision": "FP8_DYNAMIC"}),
    ("FP8-gptq-kv", "llama", {"precision": "FP8_DYNAMIC", "quantizer": "gptq", "kv_cache": "fp8"}),
    ("W4A16", "llama", {"precision": "W4A16"}),
    ("W4A16-mse", "llama", {"precision": "W4A16", "quantizer": "mse", "group_size": 32}),
    ("W4A16-gptq", "llama", {"precision": "W4A16", "quantizer": "gptq", "keep_16_bit": 2}),
    ("W4A16-head", "llama", {"precision": "W4A16", "lm_head": "8-bit", "keep_16_bit": 1, "quantizer": "mse"}),
    ("W4A16-no-group", "llama", {"precision": "W4A16", "group_size": 64}),
    (
        "W4A16-g64",
        "llama",
        {
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128},
            **{"precision": "W4A16", "group_size": 64},
        },
    ),
    ("W8A8-pointless", "llama", {"precision": "W8A8", "group_size": 64, "rotation": "pca", "repair": "stream"}),
    (
        "everything",
        "llama",
        {
            **{"num_hidden_layers": 3, "drop_from": "kl", "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"hidden_size": 64, "intermediate_size": 128, "importance": "kl", "rotation": "pca", "repair": "stream"},
            **{"precision": "W8A8", "smoothing": "smoothquant", "quantizer": "gptq", "keep_16_bit": 1},
            **{"lm_head": "8-bit", "kv_cache": "fp8"},
        },
    ),
    ("exaone4-all", "exaone4", {"num_hidden_layers": 3, "intermediate_size": 128, "precision": "W8A8"}),
    ("exaone4-pca", "exaone4", {"hidden_size": 64, "rotation": "pca", "repair": "stream", "importance": "energy"}),
    ("exaone4-smooth", "exaone4", {"precision": "W8A8", "smoothing": "smoothquant", "quantizer": "gptq"}),
    ("qwen2-hidden", "qwen2", {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}),
    ("qwen2-stream", "qwen2", {"num_hidden_layers": 3, "drop_from": "kl", "repair": "stream"}),
    ("qwen3-heads", "qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "importance": "flap"}),
    ("smollm3-depth", "smollm3", {"num_hidden_layers": 2, "precision": "FP8_DYNAMIC"}),
    ("gemma3-ffn", "gemma3_text", {"intermediate_size": 96, "repair": "ridge", "hidden_size": 72}),
    ("gemma3-W4A16", "gemma3_text", {"precision": "W4A16", "quantizer": "gptq", "num_hidden_layers": 3}),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [  # family, what differs: plans that can't be built or served
    ("llama", {"num_hidden_layers": 0}),
    ("llama", {"num_hidden_layers": 5}),
    ("llama", {"num_attention_heads": 5}),
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    ("llama", {"num_attention_heads": 6, "num_key_value_heads": 4}),
    ("llama", {"hidden_size": 97}),
    ("llama", {"intermediate_size": 0}),
    ("llama", {"num_hidden_layers": 3, "drop_from": "middle"}),
    ("llama", {"num_hidden_layers": 3, "drop_from": "1,2"}),
    ("llama", {"num_hidden_layers": 2, "drop_from": "1,7"}),
    ("llama", {"intermediate_size": 96, "importance": "magnitude"}),
    ("llama", {"precision": "W4A16", "group_size": 128}),
    ("llama", {"precision": "W4A16", "group_size": 48}),
    ("llama", {"precision": "W4A16", "intermediate_size": 100}),
    ("llama", {"precision": "INT3"}),
    ("llama", {"quantizer": "gptq"}),
    ("llama", {"precision": "FP8_DYNAMIC", "smoothing": "smoothquant"}),
    ("llama", {"precision": "W8A8", "group_size": 64}),
    ("llama", {"precision": "W8A8", "keep_16_bit": 16}),
    ("llama", {"precision": "W8A8", "keep_16_bit": -1}),
    ("llama", {"hidden_size": 70}),
    ("llama", {"precision": "W8A8", "intermediate_size": 100}),
    ("smollm3", {"precision": "W8A8", "kv_cache": "fp8"}),
    ("exaone4", {"precision": "W4A16", "hidden_size": 66}),
]
SPACES: dict[str, dict[str, Any]] = {
    "depth": {"num_hidden_layers": {"low": 2, "high": 4}, "drop_from": ["importance", "kl", "top"]},
    "widths": {
        "num_key_value_heads": {"low": 1, "high": 3},
        "num_attention_heads": {"low": 2, "high": 6},
        "hidden_size": {"low": 48, "high": 96, "step": 12},
        "intermediate_size": {"low": 96, "high": 160, "step": 32},
        "importance": ["energy", "activation", "flap"],
        "rotation": ["pca", "none"],
        "repair": ["stream", "ridge", "none"],
    },
    "everything": {
        "num_hidden_layers": {"low": 2, "high": 4},
        "num_key_value_heads": {"low": 2, "high": 3},
        "precision": ["bfloat16", "float16", "W8A8", "FP8_DYNAMIC", "W4A16"],
        "repair": ["none", "stream"],
        "smoothing": ["smoothquant", "none"],
        "quantizer": ["nearest", "mse", "gptq"],
        "group_size": [0, 32],
        "keep_16_bit": {"low": 1, "high": 5, "step": 2},
        "lm_head": ["16-bit", "8-bit"],
        "kv_cache": ["auto", "fp8"],
    },
    "fixed": {"num_hidden_layers": 3, "intermediate_size": 128, "precision": ["W8A8"], "keep_16_bit": 1},
}


class World:
    """The models, the texts and the settings of one directory, made once."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.project, world = directory, _module("project"), _module("world")
        self.world = world
        self.models: dict[str, Path] = {}
        for name, seed in (("fit", 1), ("more", 2), ("search", 3), ("report", 4)):
            world.write_text(directory / f"{name}.txt", seed)

    def model(self, family: str) -> Path:
        if family not in self.models:
            self.models[family] = self.world.write_model(self.directory / "models" / family, family)
        return self.models[family]

    def file(self, family: str, **changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "study_name": "golden",
            "outputs": str(self.directory / "outputs" / family),
            "model": {"source": str(self.model(family))},
            "text": {
                "search": [str(self.directory / "search.txt")],
                "calibration": [str(self.directory / "fit.txt"), str(self.directory / "more.txt")],
                "report": [str(self.directory / "report.txt")],
                "window": 48,
                "calibration_windows": 4,
                "moments_windows": 6,
                "shards": 4,
            },
            "evaluation": {"backend": "transformers", "device": "cpu", "speed": "predicted"},
            "tracking": {"mlflow": False},
        }
        return {**values, **changes}


def plans(world: World) -> Any:
    """Digests, names, cache keys and sizes."""
    project, found = world.project, {}
    settings: dict[str, Any] = {}
    for name, family, changes in PLANS:
        of = settings.setdefault(family, project.prepare(world.file(family)))
        plan = project.canonical(dataclasses.replace(project.identity(of), **changes), of)
        found[name] = {
            "canonical": plan.to_dict(),
            "name": project.name_of(plan, of),
            "digest": project.plan_digest(plan, of),
            "key": project.key(plan, of),
            "file_bytes": None if project.infeasible(plan, of, gpu=False) else project.file_bytes(plan, of),
            "on a GPU": project.infeasible(plan, of, gpu=True),
            "elsewhere": project.infeasible(plan, of, gpu=False),
            "of 100 kB": project.infeasible(plan, of, gpu=False, max_bytes=100_000),
        }
    return found


def refused(world: World) -> Any:
    """Why plans can't be built or served."""
    project, found = world.project, []
    settings: dict[str, Any] = {}
    for family, changes in REFUSED:
        of = settings.setdefault(family, project.prepare(world.file(family)))
        plan = dataclasses.replace(project.identity(of), **changes)
        found.append([family, changes, project.infeasible(plan, of, gpu=True)])
    return found


def suggested(world: World) -> Any:
    """The order and the names of `suggest` calls, and what comes of them."""
    import optuna

    project, found = world.project, {}
    for name, space in SPACES.items():
        of = project.prepare(world.file("llama", space=space))
        for seed in range(3):
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
            rows = []
            for _ in range(6):
                trial = study.ask()
                plan = project.suggest(trial, of)
                rows.append([list(trial.params.items()), plan.to_dict()])
            found[f"{name}, seed {seed}"] = rows
        found[f"{name}, uncut"] = project.uncut(of)
    return found


def definitions(world: World) -> Any:
    """What must not change under a study's name."""
    project, found = world.project, {}
    for name, space in SPACES.items():
        found[name] = project.definition(project.prepare(world.file("llama", space=space)))
    limited = world.file("exaone4", limits={"max_size_mb": 1.5}, pruner={"name": "median"})
    found["limited"] = project.definition(project.prepare(limited))
    text = json.dumps(found)
    return json.loads(text.replace(str(world.directory), "DIRECTORY"))


def _each_built(world: World) -> Iterator[tuple[str, Any, Any]]:
    settings: dict[str, Any] = {}
    for name, family, changes in PLANS:
        of = settings.setdefault(family, world.project.prepare(world.file(family)))
        plan = world.project.canonical(dataclasses.replace(world.project.identity(of), **changes), of)
        yield name, plan, of


def builds(world: World) -> Any:
    """The sha256 of each plan's weights, or their projections, and what else is written."""
    found = {}
    for name, plan, of in _each_built(world):
        if world.project.infeasible(plan, of, gpu=False):
            continue
        to = world.directory / "built" / name
        sha256 = world.project.write(plan, of, to)
        config = json.loads((to / "config.json").read_text())
        config.pop("transformers_version")
        (config.get("quantization_config") or {}).pop("version", None)
        weights = projections(to) if plan.repair == "stream" else sha256
        found[name] = {"weights": weights, "config": config, "files": sorted(file.name for file in to.iterdir())}
    return found


def projections(built: Path) -> dict[str, list[float]]:
    """The norm of each tensor, and what is along a random direction of it; channels in another order have another."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for name, tensor in sorted(load_file(built / "model.safetensors").items()):
        values = tensor.double().flatten()
        direction = torch.randn(len(values), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        norm = values.norm().item()
        along = (values @ direction).item() / norm if norm else 0.0
        found[name] = [float(f"{norm:.6g}"), round(along, 5)]
    return found


def screens(world: World) -> Any:
    """Quality in memory, shard by shard."""
    return {
        name: world.project.screen(plan, of)
        for name, plan, of in _each_built(world)
        if not world.project.infeasible(plan, of, gpu=False)
    }


SECTIONS = (plans, refused, suggested, definitions, builds, screens)

if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    (target,) = sys.argv[1:]
    the_world = World(Path(target))
    made = {section.__name__: section(the_world) for section in SECTIONS}
    (Path(target) / "computed.json").write_text(json.dumps(made))
