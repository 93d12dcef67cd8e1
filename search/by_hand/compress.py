"""One plan by hand: what a person names → a CompressionPlan → a checkpoint directory. The study builds just so.

Knows no engine: a model can be compressed where it can't be served.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from compressors import build
from compressors.choices import DTYPES, SCHEMES
from compressors.device import release
from compressors.errors import InfeasiblePlan
from compressors.files import write_json
from compressors.model.transformers_version import retarget
from compressors.plan import CHOICES, DESCRIPTION, DIMENSIONS, OPTIONS, CompressionPlan, canonical
from evaluator.backends import kernels
from search import files
from search.config.study_file import Compression
from search.errors import UsageError
from search.files import read_json
from search.say import Say
from search.setup import collect, keys
from search.setup.machine import require_disk
from search.setup.setting import Setting


def plan_of(compression: Compression, base: CompressionPlan) -> CompressionPlan:
    """The plan that a study file's `compression` names for this base model. Raises UsageError for one that does
    nothing."""
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
            "compress: nothing to do: the model is so already; name a method (drop-layers --keep-layers 26, …), an "
            "experiment (experiments=NAME) or a key (compression.keep_layers=26)"
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
    """What a plan makes: told before anything is built. bytes: of model.safetensors.

    warnings: of what loads but will not run as one would expect.
    """

    plan: CompressionPlan
    parameters: int
    base_parameters: int
    bytes: int
    base_bytes: int
    warnings: tuple[str, ...] = ()


def foresee(plan: CompressionPlan, setting: Setting) -> Outcome:
    """Raises InfeasiblePlan for a plan that stock loaders would refuse, or that exceeds a limit."""
    reason = setting.infeasible(plan)
    if reason:
        raise InfeasiblePlan(reason)
    warnings = []
    if setting.kernels is None:
        slow = build.check(plan, setting.model.checkpoint, setting.model.family, kernels=kernels("vllm", "cuda"))
        if slow:
            warnings.append(f"on a GPU vLLM would fall back to a slow kernel, or refuse it: {slow}")
    remark = setting.file.model.num_layers
    if remark is not None and remark != plan.num_hidden_layers:
        warnings.append(f"model.num_layers says {remark}, and the result has {plan.num_hidden_layers}")
    if plan.precision in SCHEMES and setting.model.identity.precision == "float32":
        warnings.append(f"the base model is float32: what {plan.precision} leaves out becomes bfloat16")
    made = build.shapes(plan, setting.model.checkpoint, setting.model.family)
    return Outcome(
        plan=plan,
        parameters=made.total_parameters,
        base_parameters=setting.model.checkpoint.total_parameters,
        bytes=made.file_bytes,
        base_bytes=setting.model.checkpoint.file_bytes,
        warnings=tuple(warnings),
    )


@dataclasses.dataclass(frozen=True)
class Compressed:
    path: Path
    outcome: Outcome
    weights_sha256: str
    changes: tuple[str, ...] = ()  # made for the target
    reused: bool = False  # it was there already
    replaced: bool = False  # another model was there


def compress(outcome: Outcome, setting: Setting, to: Path, target: str | None, say: Say = lambda _: None) -> Compressed:
    """Write the checkpoint to `to`: config.json, model.safetensors, tokenizer files, compression.json.

    target: the version of transformers that is to read it; None: the running one. What is in `to` already, made of the
    same model by the same plan for the same target, is left there. Raises UsageError and CompressionError.
    """
    described = keys.description(setting, outcome.plan, target)
    there = made_before(to, described)
    if there is not None:
        return Compressed(to, outcome, there, reused=True)
    files.refuse_foreign(to, "compress", setting.model.path)
    require_disk(outcome.bytes, to.parent, "the compressed model")
    needed = build.needs_activations(outcome.plan, setting.model.identity)
    calibration = collect.calibrate(setting, say) if needed else None
    moments = collect.moments_for(setting, outcome.plan, say)
    made = build.apply(
        outcome.plan,
        setting.model.checkpoint,
        setting.model.family,
        calibration,
        moments=moments,
        device=setting.machine.device,
        say=say,
    )
    build.require_size(made, setting.max_bytes)
    say(f"writing {to.name}, {made.file_bytes / 1e6:.0f} MB")
    replaced = (to / "config.json").is_file()
    with files.beside(to, "compress") as scratch:
        weights_sha256 = made.write(scratch)
        changes = retarget(scratch, target) if target is not None else []
        write_json(scratch / DESCRIPTION, {**described, "weights_sha256": weights_sha256})
    release(setting.machine.device)
    return Compressed(to, outcome, weights_sha256, tuple(changes), replaced=replaced)


def made_before(path: Path, described: dict[str, Any]) -> str | None:
    """The sha256 of the weights in `path` if they were made just so, else None."""
    known = read_json(path / DESCRIPTION) or {}
    same = all(known.get(key) == described[key] for key in ("plan_digest", "for_transformers"))
    if same and (path / "model.safetensors").is_file() and (path / "config.json").is_file():
        return str(known["weights_sha256"])
    return None


def to_json(outcome: Outcome) -> dict[str, Any]:
    return {**dataclasses.asdict(outcome), "warnings": list(outcome.warnings)}


def target_of(path: Path) -> str | None:
    """The version of transformers that the checkpoint in `path` was written for, if it says so."""
    target = (read_json(path / DESCRIPTION) or {}).get("for_transformers")
    return None if target is None else str(target)
