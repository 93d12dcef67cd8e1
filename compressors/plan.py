"""CompressionPlan: what a compressed model is, in the words of a Hugging Face config.

Knows no tensors, no study and no metric.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, get_type_hints

from compressors.choices import PRECISIONS, SCHEMES, Choice, Dimension, Need, Value, choice, needed_unless
from compressors.files import digest_of_json

VERSION = 1  # raised whenever the same plan would be built otherwise: what was cached before is then built again
# the order in which a build is carried out, see `compressors.steps`
STEPS = ("rotation", "depth", "heads", "ffn", "hidden", "stream", "recast", "distill", "scales", "quantize")


def _cuts_layers(plan: CompressionPlan, base: CompressionPlan) -> bool:
    return plan.num_hidden_layers != base.num_hidden_layers


def _cuts_key_value_heads(plan: CompressionPlan, base: CompressionPlan) -> bool:
    return plan.num_key_value_heads != base.num_key_value_heads


def _cuts_heads_or_ffn(plan: CompressionPlan, base: CompressionPlan) -> bool:
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    return any(getattr(plan, name) != getattr(base, name) for name in names)


def _cuts_hidden(plan: CompressionPlan, base: CompressionPlan) -> bool:
    return plan.hidden_size != base.hidden_size


def _can_be_repaired(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Whether a projection lost inputs, `stream` can refit one before a dropped layer, or `distill` finds anything."""
    return (
        _cuts_heads_or_ffn(plan, base)
        or _cuts_hidden(plan, base)
        or (plan.repair == "stream" and leaves_gap(plan, base))
        or (plan.repair == "distill" and (_cuts_layers(plan, base) or learns_scales(plan)))
    )


def is_cut(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Return whether the plan is smaller than the base model along any dimension."""
    return any(getattr(plan, name) != getattr(base, name) for name in DIMENSIONS)


def learns_scales(plan: CompressionPlan) -> bool:
    """Return whether the plan rounds weights alone, and a distillation follows."""
    return plan.repair == "distill" and plan.precision == "W4A16"


def leaves_gap(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Return whether a layer that goes has one before it that stays, whose last projection `stream` can refit."""
    going = base.num_hidden_layers - plan.num_hidden_layers
    first = plan.drop_from == "bottom" or layers_named(plan.drop_from) == tuple(range(going))
    return going > 0 and not first


def _is_quantized(plan: CompressionPlan, base: CompressionPlan) -> bool:
    return plan.precision in SCHEMES


NEEDS_SCHEME = (
    "{value} goes with a scheme, and {precision} quantises nothing; choose {default}, or one of " + ", ".join(SCHEMES)
)


@dataclasses.dataclass(frozen=True)
class CompressionPlan:
    """The dimensions and the precision of a compressed model, and how what goes is chosen.

    Widths are global, as stock loaders read them: every layer has the same `num_attention_heads`,
    `num_key_value_heads` and `intermediate_size`; which heads and channels stay may differ by layer.
    What each choice means is said in its record (`CHOICES`). `drop_from` may also name the layers that go, numbered
    from 0 and separated by commas.
    """

    num_hidden_layers: Annotated[int, Dimension("keep_layers", "drop_layers", "drop")]
    num_attention_heads: Annotated[int, Dimension("keep_heads", "prune_heads", "heads")]
    num_key_value_heads: Annotated[int, Dimension("keep_kv_heads", "prune_heads", "kv")]
    hidden_size: Annotated[int, Dimension("hidden_size", "reduce_hidden", "hidden")]
    intermediate_size: Annotated[int, Dimension("intermediate_size", "reduce_ffn", "ffn")]
    precision: str
    drop_from: str = choice(
        *("importance", "kl", "kl-look-ahead", "top", "bottom"),
        help="Rule that chooses which layers go; a list such as 20,21 names them, numbered from 0.",
        meanings={
            "importance": "those whose input and output differ least (block influence)",
            "kl": "one after the other, the one without which the predictions change least",
            "kl-look-ahead": "the same, looking one layer further",
            "top": "the last ones",
            "bottom": "the first ones",
        },
        methods=("drop_layers",),
        short="drop {}",
        applies=_cuts_layers,
        needs=lambda value: {
            "importance": Need.ACTIVATIONS,
            "kl": Need.SECOND_MOMENTS,
            "kl-look-ahead": Need.SECOND_MOMENTS,
        }.get(str(value), Need.NOTHING),
    )
    importance: str = choice(
        *("activation", "energy", "flap", "obs", "kl"),
        help="Measure that chooses which heads and FFN channels stay.",
        meanings={
            "activation": "their mean activity (Minitron)",
            "energy": "what they add to the output",
            "flap": "the variance of their input times the norm of their weights (FLAP)",
            "obs": "the least-squares loss of removing them (OBS)",
            "kl": "key/value heads by what the predictions lose without them, the rest by energy",
        },
        methods=("prune_heads", "reduce_ffn"),
        short="{}",
        applies=_cuts_heads_or_ffn,
        otherwise={"kl": (_cuts_key_value_heads, "energy")},
        needs=needed_unless("activation"),
    )
    rotation: str = choice(
        *("none", "pca"),
        help="Basis of the residual stream in which hidden_size is cut.",
        meanings={
            "none": "the model's own: its most active dimensions stay",
            "pca": "its principal components; a tied lm_head is then stored apart from the embedding",
        },
        methods=("reduce_hidden",),
        short="{}",
        applies=_cuts_hidden,
        needs=needed_unless("none"),
    )
    repair: str = choice(
        *("none", "ridge", "stream", "distill"),
        help="Repair of the weights that stay, on the calibration text.",
        meanings={
            "none": "the weights stay as they are",
            "ridge": "each projection takes over from the inputs that it lost",
            "stream": "layer after layer, so that the residual stream becomes the base model's again",
            "distill": "as ridge, where layers went as stream; then all weights learn from the base model for a while, "
            "of W4A16 the scales",
        },
        methods=("drop_layers", "prune_heads", "reduce_hidden", "reduce_ffn", "quantize"),
        short="{}",
        applies=_can_be_repaired,
        needs=needed_unless("none"),
    )
    smoothing: str = choice(
        *("none", "smoothquant"),
        help="Scaling of inputs against weights before W8A8 rounds both.",
        meanings={"none": "no scaling", "smoothquant": "each channel by a power of two (SmoothQuant)"},
        methods=("quantize",),
        short="{}",
        applies=lambda plan, base: plan.precision == "W8A8",
        schemes=("W8A8",),
        refusal="{value} is of W8A8 alone, whose inputs are rounded to integers; with {precision} it wins nothing; "
        "choose {default}",
        needs=needed_unless("none"),
    )
    quantizer: str = choice(
        *("nearest", "mse", "gptq"),
        help="Method that rounds the weights of a scheme.",
        meanings={
            "nearest": "to the nearest value, with the largest scale",
            "mse": "to the nearest value, with the scale of least squared error",
            "gptq": "column by column, later columns making up for the error (GPTQ)",
        },
        methods=("quantize",),
        short="{}",
        applies=_is_quantized,
        schemes=SCHEMES,
        refusal=NEEDS_SCHEME,
        needs=lambda value: Need.SECOND_MOMENTS if value == "gptq" else Need.NOTHING,
    )
    group_size: int = choice(
        *(0, 32, 64, 128),
        help="Number of inputs that share a scale in W4A16.",
        meanings={0: "the largest of 128, 64, 32 that fits"},
        methods=("quantize",),
        short="g{}",
        applies=lambda plan, base: plan.precision == "W4A16",
        schemes=("W4A16",),
        refusal="{value} is of W4A16 alone, and {precision} has one scale per output channel; choose {default}",
    )
    keep_16_bit: int = choice(
        help="Number of projections that stay in 16 bits, the most sensitive first.",
        methods=("quantize",),
        short="keep{}",
        applies=_is_quantized,
        schemes=SCHEMES,
        refusal=NEEDS_SCHEME,
        needs=lambda value: Need.SECOND_MOMENTS if int(value) > 0 else Need.NOTHING,
    )
    lm_head: str = choice(
        *("16-bit", "8-bit"),
        help="Precision of the lm_head of a quantized model.",
        meanings={"16-bit": "as it is", "8-bit": "8 bits, apart from the embedding; wants vLLM 0.20 or later"},
        methods=("quantize",),
        short="lmhead8",
        applies=_is_quantized,
        schemes=SCHEMES,
        refusal=NEEDS_SCHEME,
    )
    kv_cache: str = choice(
        *("auto", "fp8"),
        help="Type of the key/value cache of a quantized model.",
        meanings={"auto": "the model's own", "fp8": "float8_e4m3fn with scale 1"},
        methods=("quantize",),
        short="kv{}",
        applies=_is_quantized,
        schemes=SCHEMES,
        refusal=NEEDS_SCHEME,
    )

    @classmethod
    def identity(cls, config: Mapping[str, Any]) -> CompressionPlan:
        """Return the plan that changes nothing of a model with this config.json."""
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

    @property
    def needs(self) -> Need:
        """What its choices need to know of the base model."""
        found = Need.NOTHING
        for name, record in CHOICES.items():
            found |= record.needs(getattr(self, name))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return its values as plain JSON values, by field."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionPlan:
        """Make a plan of `to_dict`'s values; raises TypeError for an unknown or missing name."""
        return cls(**values)

    def digest(self, base: str) -> str:
        """Name what this plan makes of the model whose digest is `base`: 16 hexadecimal digits.

        A choice at its default is left out, so that a new choice renames no older plan.
        """
        named = {name: value for name, value in self.to_dict().items() if OPTIONS.get(name) != value}
        return digest_of_json([VERSION, base, named], 16)


CHOICES: dict[str, Choice] = {
    field.name: field.metadata["choice"] for field in dataclasses.fields(CompressionPlan) if "choice" in field.metadata
}
DIMENSIONS: dict[str, Dimension] = {
    name: record
    for name, hint in get_type_hints(CompressionPlan, include_extras=True).items()
    for record in getattr(hint, "__metadata__", ())
}
OPTIONS = {name: record.default for name, record in CHOICES.items() if name != "drop_from"}  # it is older than digests
PRECISION_NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "FP8_DYNAMIC": "fp8"}  # in names of files
DESCRIPTION = "compression.json"  # next to the weights: which plan made them, of which model


def layers_named(drop_from: str) -> tuple[int, ...] | None:
    """Read a list of layers: `"7,3"` → (3, 7), and None for what is no list."""
    words = drop_from.split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() for word in words):
        return None
    return tuple(sorted({int(word) for word in words}))


def canonical(plan: CompressionPlan, base: CompressionPlan) -> CompressionPlan:
    """Give every choice that makes no difference its default, so that plans that make the same model are equal."""
    settled: dict[str, Any] = {}
    for name, record in CHOICES.items():
        value = getattr(plan, name)
        if not record.applies(plan, base):
            settled[name] = record.default
        elif value in record.otherwise:
            makes_a_difference, elsewhere = record.otherwise[value]
            settled[name] = value if makes_a_difference(plan, base) else elsewhere
    return dataclasses.replace(plan, **settled)


def name_of(plan: CompressionPlan, base: CompressionPlan) -> str:
    """Name what differs from the base model and the defaults, for directories and runs: `drop28_w8a8_gptq`.

    Different plans have different names.
    """
    words = [
        f"{record.short}{getattr(plan, name)}"
        for name, record in DIMENSIONS.items()
        if getattr(plan, name) != getattr(base, name)
    ]
    if plan.num_hidden_layers != base.num_hidden_layers and plan.drop_from != CHOICES["drop_from"].default:
        words[0] += f"-{plan.drop_from.replace(',', '-')}"
    if plan.precision != base.precision:
        words.append(PRECISION_NAMES.get(plan.precision, plan.precision.lower()))
    words += chosen(plan, OPTIONS)
    return "_".join(words) or "base"


def chosen(plan: CompressionPlan, names: Mapping[str, Value] | None = None) -> list[str]:
    """Show the choices that are not at their defaults, in a word or two each."""
    shown = CHOICES if names is None else names
    return [
        CHOICES[name].short.format(getattr(plan, name))
        for name in shown
        if getattr(plan, name) != CHOICES[name].default
    ]


def short(plan: CompressionPlan) -> str:
    """Show a plan in a line: layers, query and key/value heads, hidden size, FFN width, precision, choices."""
    heads = f"{plan.num_attention_heads}/{plan.num_key_value_heads}"
    widths = f"hidden {plan.hidden_size} FFN {plan.intermediate_size}"
    return " ".join([f"{plan.num_hidden_layers}L {heads}H {widths} {plan.precision}", *chosen(plan)])


def why_choices_clash(plan: CompressionPlan) -> str | None:
    """Say which choice has an unknown value, or does not go with the plan's precision; None where all are sound."""
    for name, record in CHOICES.items():
        value = getattr(plan, name)
        if record.is_number:
            if value < 0:
                return f"{name}: {value} projections can't stay unquantised; take 0 or more"
        elif value not in record.values and not (name == "drop_from" and plan.dropped_layers is not None):
            more = ", nor a list of layers" if name == "drop_from" else ""
            more = f"is not one of {', '.join(map(str, record.values))}{more}"
            return f"{name}: {value!r} {more}"
    if plan.precision not in PRECISIONS:
        return f"precision: {plan.precision!r} is not one of {', '.join(PRECISIONS)}"
    for name, record in CHOICES.items():
        value = getattr(plan, name)
        if value != record.default and record.schemes and plan.precision not in record.schemes:
            why = record.refusal if plan.precision in SCHEMES else NEEDS_SCHEME
            return f"{name}: {why.format(value=value, precision=plan.precision, default=record.default)}"
    return None
