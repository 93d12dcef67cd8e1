"""Compresses by hand: a study file's `compression` → a CompressionPlan → a checkpoint directory.

A study builds its models with the same code. No engine is needed: a model can be compressed where it can't be served.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from compressors import build, cached
from compressors.choices import DTYPES, SCHEMES
from compressors.device import release
from compressors.errors import InfeasiblePlan
from compressors.files import write_json
from compressors.model.checkpoint import Checkpoint
from compressors.model.loading import broken_named, write_checked
from compressors.plan import CHOICES, DESCRIPTION, DIMENSIONS, OPTIONS, CompressionPlan, canonical
from evaluator import checkpoint_files
from evaluator.backends import kernels
from search import files
from search.config.compression import Compression
from search.errors import UsageError
from search.files import read_json
from search.say import Say
from search.setup import collect, keys
from search.setup.machine import require_disk
from search.setup.setting import Setting


def plan_of(compression: Compression, base: CompressionPlan) -> CompressionPlan:
    """Return the plan that a study file's `compression` stands for.

    Args:
        compression: The section of the study file.
        base: The plan of the base model, which cuts nothing.

    Raises:
        UsageError: The plan is the base model itself, or the number of layers contradicts the list of layers.
    """
    drop_from = compression.drop_from
    keep = compression.keep_layers
    if isinstance(drop_from, list):
        left = base.num_hidden_layers - len(drop_from)
        if keep is not None and keep != left:
            raise UsageError(
                f"compression: keep_layers is {keep}, and drop_from names {len(drop_from)} of the model's "
                f"{base.num_hidden_layers} layers, which leaves {left}; leave keep_layers out"
            )
        keep, drop_from = left, ",".join(map(str, sorted(drop_from)))
    sizes = {name: getattr(compression, record.key) for name, record in DIMENSIONS.items()}
    sizes["num_hidden_layers"] = keep
    narrowed = "hidden_size" if "reduce_hidden" in compression.methods else "intermediate_size"
    sizes[narrowed] = sizes[narrowed] or compression.target_dim
    if compression.keep_kv_heads is not None and compression.keep_heads is None:
        # a key/value head goes with the query heads that share it
        each = base.num_attention_heads // base.num_key_value_heads
        sizes["num_attention_heads"] = each * compression.keep_kv_heads
    plan = dataclasses.replace(
        base,
        **{name: size for name, size in sizes.items() if size is not None},
        precision=compression.scheme or compression.dtype or base.precision,
        drop_from=drop_from,
        **{name: value for name in OPTIONS if (value := getattr(compression, name)) is not None},
    )
    plan = canonical(plan, base)
    if plan == base:
        raise UsageError(
            "compress: nothing to do: this plan is the base model itself; name a method (drop-layers --keep-layers 26, "
            "…), an experiment (experiments=NAME) or a key (compression.keep_layers=26)"
        )
    return plan


def overrides_of(plan: CompressionPlan, base: CompressionPlan) -> list[str]:
    """Return the KEY=VALUE words for which `plan_of` returns this plan of this base model."""
    words = [
        f"compression.{record.key}={getattr(plan, name)}"
        for name, record in DIMENSIONS.items()
        if getattr(plan, name) != getattr(base, name)
    ]
    if plan.precision != base.precision:
        words.append(f"compression.{'dtype' if plan.precision in DTYPES else 'scheme'}={plan.precision}")
    for name, record in CHOICES.items():
        value = getattr(plan, name)
        if value != record.default:
            listed = name == "drop_from" and plan.dropped_layers is not None
            words.append(f"compression.{name}={f'[{value}]' if listed else value}")
    return words


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome holds the expected size of a plan's model, before anything is built.

    Attributes:
        plan: The plan.
        parameters: The number of parameters of the result.
        base_parameters: The number of parameters of the base model.
        bytes: The size of the result's model.safetensors.
        base_bytes: The size of the base model's safetensors files.
        warnings: Sentences about models that load and yet run otherwise than expected.
    """

    plan: CompressionPlan
    parameters: int
    base_parameters: int
    bytes: int
    base_bytes: int
    warnings: tuple[str, ...] = ()


def foresee(plan: CompressionPlan, setting: Setting) -> Outcome:
    """Return the expected size of a plan's model, with warnings.

    Raises:
        InfeasiblePlan: Stock loaders would refuse the model, or it exceeds a limit.
    """
    reason = setting.infeasible(plan)
    if reason:
        raise InfeasiblePlan(reason)
    warnings = []
    if setting.kernels is None:
        slow = build.check(plan, setting.model.checkpoint, setting.model.family, kernels=kernels("vllm", "cuda"))
        if slow:
            warnings.append(f"on a GPU vLLM would use a slow kernel or refuse the model: {slow}")
    remark = setting.file.model.num_layers
    if remark is not None and remark != plan.num_hidden_layers:
        warnings.append(f"model.num_layers is {remark}, and the result has {plan.num_hidden_layers}")
    if plan.precision in SCHEMES and setting.model.identity.precision == "float32":
        warnings.append(f"the base model is float32: tensors that {plan.precision} does not quantize become bfloat16")
    result = build.shapes(plan, setting.model.checkpoint, setting.model.family)
    return Outcome(
        plan=plan,
        parameters=result.total_parameters,
        base_parameters=setting.model.checkpoint.total_parameters,
        bytes=result.file_bytes,
        base_bytes=setting.model.checkpoint.file_bytes,
        warnings=tuple(warnings),
    )


@dataclasses.dataclass(frozen=True)
class Compressed:
    """Compressed describes a checkpoint that `compress` has written or found.

    Attributes:
        path: The directory of the checkpoint.
        outcome: The expected size, and the plan.
        weights_sha256: The sha256 of model.safetensors.
        changes: The changes to its files for the target version of transformers, a sentence each.
        reused: Whether the directory already held this model.
        replaced: Whether the directory held another model.
    """

    path: Path
    outcome: Outcome
    weights_sha256: str
    changes: tuple[str, ...] = ()
    reused: bool = False
    replaced: bool = False


def compress(outcome: Outcome, setting: Setting, to: Path, target: str | None, say: Say = lambda _: None) -> Compressed:
    """Write a checkpoint: config.json, model.safetensors, tokenizer files and compression.json.

    A directory that already holds this model, from the same plan for the same target, is left as it is.

    Args:
        outcome: The plan and its expected size.
        setting: What the study file sets up: base model, texts and machine.
        to: The directory to write.
        target: The version of transformers that reads the checkpoint; None: the running one.
        say: A function that shows the current step.

    Raises:
        UsageError: `to` must not be replaced or can't be written.
        CompressionError: The model can't be built.
    """
    described = keys.description(setting, outcome.plan, target)
    known = written_before(to, described)
    if known is not None:
        return Compressed(to, outcome, known, reused=True)
    files.refuse_foreign(to, "compress", *setting.sources)
    require_disk(outcome.bytes, to.parent, "the compressed model")
    with broken_named(**{"base model": setting.model.checkpoint}):
        return _write(outcome, setting, to, target, described, say)


def _write(
    outcome: Outcome, setting: Setting, to: Path, target: str | None, described: dict[str, Any], say: Say
) -> Compressed:
    model = _built(outcome.plan, setting, say)
    build.require_size(model, setting.max_bytes)
    say(f"writing {to.name}, {model.file_bytes / 1e6:.0f} MB")
    replaced = (to / "config.json").is_file()
    with files.atomic_directory(to, "compress") as scratch:
        weights_sha256, changes = write_checked(model, scratch, setting.model.checkpoint, target)
        write_json(scratch / DESCRIPTION, {**described, "weights_sha256": weights_sha256})
    release(setting.machine.device)
    return Compressed(to, outcome, weights_sha256, tuple(changes), replaced=replaced)


def _built(plan: CompressionPlan, setting: Setting, say: Say) -> Checkpoint:
    needed = build.needs_activations(plan, setting.model.identity)
    return build.apply(
        plan,
        setting.model.checkpoint,
        setting.model.family,
        collect.calibrate(setting, say) if needed else None,
        moments=collect.moments_for(setting, plan, say),
        device=setting.machine.device,
        say=say,
    )


def written_before(path: Path, described: dict[str, Any]) -> str | None:
    """Return the sha256 of the weights in `path` where compression.json matches `described`, else None."""
    known = read_json(path / DESCRIPTION) or {}
    same = all(known.get(key) == described[key] for key in ("plan_digest", "for_transformers"))
    if not same or not (path / "model.safetensors").is_file() or not (path / "config.json").is_file():
        return None
    if known.get("weights_sha256") != checkpoint_files.weights_sha256_of(path):
        cached.tell(path, "its weights are not those that were written")
        return None
    return str(known["weights_sha256"])


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as --json prints it."""
    return {**dataclasses.asdict(outcome), "warnings": list(outcome.warnings)}
