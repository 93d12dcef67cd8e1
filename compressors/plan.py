"""CompressionPlan: what a compressed model is, in the words of a Hugging Face config.

Knows no tensors, no study and no metric.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
SCHEMES = ("W8A8", "FP8_DYNAMIC", "W4A16")  # compressed-tensors preset schemes, round to nearest
PRECISIONS = DTYPES + SCHEMES
DROP_FROM = ("importance", "kl", "kl-look-ahead", "top", "bottom")
CHOICES = {  # of a plan's options, the default first
    "importance": ("activation", "energy", "flap", "obs", "kl"),
    "rotation": ("none", "pca"),
    "repair": ("none", "ridge", "stream"),
    "smoothing": ("none", "smoothquant"),
    "quantizer": ("nearest", "mse", "gptq"),
    "group_size": (0, 32, 64, 128),
    "lm_head": ("16-bit", "8-bit"),
    "kv_cache": ("auto", "fp8"),
}
RECIPE = 1  # raised whenever the same plan would be built otherwise: what was cached before is then built anew


@dataclasses.dataclass(frozen=True)
class CompressionPlan:
    """The dimensions and the precision of a compressed model, and how what goes is chosen.

    Widths are global, as stock loaders read them: every layer has the same `num_attention_heads`,
    `num_key_value_heads` and `intermediate_size`; which heads and channels stay may differ by layer.

    drop_from: how layers are chosen. "importance": those whose input and output differ least on the
        calibration text (block influence, ShortGPT, https://arxiv.org/abs/2403.03853); "kl": one after the other, the
        one without which the predictions change least, "kl-look-ahead": the one that leaves the cheapest next one
        (`compressors.leave_one_out`); "top": the last ones before the final norm; "bottom": the first ones; "3,7": just
        these go, numbered from 0.
    importance: how heads and channels are chosen: by "activation" (Minitron), "energy", "flap" or "obs"; "kl":
        key/value groups by what the predictions lose (`compressors.leave_heads_out`), the rest by energy.
    rotation: which dimensions of the residual stream stay when hidden_size goes down: "none", its most active ones;
        "pca", its principal components, into which the model is turned first (`compressors.methods.rotation`).
    repair: what is done to the weights that stay, by least squares on the calibration text: "none"; "ridge", each
        projection by itself; or "stream", one layer after the other, so that the residual stream is the base model's.
    smoothing: of W8A8: "smoothquant" scales the channels of each projection's input, and its weights against them,
        before both are rounded (`compressors.methods.smoothing`).
    quantizer: how a scheme's weights are rounded: "nearest", with scales of least squared error ("mse"), or "gptq".
    group_size: of W4A16; 0: the largest of 128, 64, 32 that fits.
    keep_16_bit: how many projections (those that vLLM fuses count as one) stay unquantised, the most sensitive first.
    lm_head: "16-bit", or "8-bit" with any scheme. kv_cache: "auto", or "fp8".
    """

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_size: int
    intermediate_size: int
    precision: str
    drop_from: str = "importance"
    importance: str = "activation"
    rotation: str = "none"
    repair: str = "none"
    smoothing: str = "none"
    quantizer: str = "nearest"
    group_size: int = 0
    keep_16_bit: int = 0
    lm_head: str = "16-bit"
    kv_cache: str = "auto"

    @classmethod
    def identity(cls, config: Mapping[str, Any]) -> CompressionPlan:
        """The plan that changes nothing of a model with this config.json."""
        heads = int(config["num_attention_heads"])
        return cls(
            num_hidden_layers=int(config["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            precision=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        )

    @property
    def dropped_layers(self) -> tuple[int, ...] | None:
        """The layers that `drop_from` names one by one, ascending; None where it says how they are chosen."""
        return layers_named(self.drop_from)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionPlan:
        """Raises TypeError for an unknown or missing name."""
        return cls(**values)

    def digest(self, base: str) -> str:
        """Names what this plan makes of the model whose digest is `base`: 16 hexadecimal digits.

        What a plan leaves at its default says nothing, so that a new choice renames no older plan.
        """
        said = {name: value for name, value in self.to_dict().items() if OPTIONS.get(name) != value}
        text = json.dumps([RECIPE, base, said], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


OPTIONS = {  # with their defaults; drop_from is older than this rule
    field.name: field.default
    for field in dataclasses.fields(CompressionPlan)
    if field.default is not dataclasses.MISSING and field.name != "drop_from"
}


def layers_named(drop_from: str) -> tuple[int, ...] | None:
    """`"7,3"` → (3, 7); None for what is no list of layers."""
    words = drop_from.split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() for word in words):
        return None
    return tuple(sorted({int(word) for word in words}))


DIMENSIONS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "intermediate_size",
)
DESCRIPTION = "compression.json"  # beside the weights: what was made of which model
SHORT = {  # how a plan is called in the names of directories and runs
    "num_hidden_layers": "drop",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv",
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
}
CHOSEN = {  # a plan's options, where they are not at their defaults
    "importance": "{}",
    "rotation": "{}",
    "repair": "{}",
    "smoothing": "{}",
    "quantizer": "{}",
    "group_size": "g{}",
    "keep_16_bit": "keep{}",
    "lm_head": "lmhead8",
    "kv_cache": "kv{}",
}
PRECISION_NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "FP8_DYNAMIC": "fp8"}


def canonical(plan: CompressionPlan, base: CompressionPlan) -> CompressionPlan:
    """Plans that make the same model become equal: how layers go says nothing when none goes, and so on."""

    def differs(*names: str) -> bool:
        return any(getattr(plan, name) != getattr(base, name) for name in names)

    nothing: dict[str, str | int] = {}
    if not differs("num_hidden_layers"):
        nothing["drop_from"] = "importance"
    chosen = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    if not differs(*chosen):
        nothing["importance"] = "activation"
    elif plan.importance == "kl" and not differs("num_key_value_heads"):
        nothing["importance"] = "energy"
    if not differs("hidden_size"):
        nothing["rotation"] = "none"
    if not differs(*chosen, "hidden_size") and not (plan.repair == "stream" and _leaves_gap(plan, base)):
        nothing["repair"] = "none"  # each projection by itself can't make up for a layer
    if plan.precision not in SCHEMES:
        nothing |= {"quantizer": "nearest", "keep_16_bit": 0, "lm_head": "16-bit", "kv_cache": "auto"}
    if plan.precision != "W8A8":
        nothing["smoothing"] = "none"
    if plan.precision != "W4A16":
        nothing["group_size"] = 0
    return dataclasses.replace(plan, **nothing)  # type: ignore[arg-type]


def _leaves_gap(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Whether a layer that goes has one before it that stays, whose last projection `stream` can refit."""
    going = base.num_hidden_layers - plan.num_hidden_layers
    first = plan.drop_from == "bottom" or layers_named(plan.drop_from) == tuple(range(going))
    return going > 0 and not first


def name_of(plan: CompressionPlan, base: CompressionPlan) -> str:
    """`drop28_w8a8_gptq`: what differs from the base model and the defaults, for the names of directories and runs.

    Different plans have different names.
    """
    words = [f"{short}{getattr(plan, key)}" for key, short in SHORT.items() if getattr(plan, key) != getattr(base, key)]
    if plan.num_hidden_layers != base.num_hidden_layers and plan.drop_from != "importance":
        words[0] += f"-{plan.drop_from.replace(',', '-')}"
    if plan.precision != base.precision:
        words.append(PRECISION_NAMES.get(plan.precision, plan.precision.lower()))
    words += [said.format(getattr(plan, key)) for key, said in CHOSEN.items() if getattr(plan, key) != OPTIONS[key]]
    return "_".join(words) or "base"
