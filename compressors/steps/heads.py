"""Remove key/value groups and query heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compressors.choices import Value
from compressors.methods import heads, heads_by_kl, importance
from compressors.methods.heads import Kept
from compressors.model.family import head_dim
from compressors.plan import CompressionPlan
from compressors.steps import Build, repaired_by_ridge

VERSIONS: Mapping[tuple[str, Value], str] = {("importance", "kl"): f"heads {heads_by_kl.VERSION}"}


def applies(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Say whether the plan removes heads."""
    own = (base.num_attention_heads, base.num_key_value_heads)
    return (plan.num_attention_heads, plan.num_key_value_heads) != own


def shapes(made: Build) -> Build:
    """Keep the first heads."""
    return _cut(made, importance.choose_heads(made.checkpoint, made.family, *_wanted(made), "activation"))


def run(made: Build) -> Build:
    """Keep the heads that the plan's measure of importance chooses, and repair what reads them by ridge."""
    kept = importance.choose_heads(
        made.checkpoint,
        made.family,
        *_wanted(made),
        made.plan.importance,
        activations=made.activations,
        moments=made.moments,
        device=made.device,
        gone=_gone_by_kl(made),
    )
    return repaired_by_ridge(_cut(made, kept), made.checkpoint, [made.family.o])


def _wanted(made: Build) -> tuple[int, int]:
    return made.plan.num_attention_heads, made.plan.num_key_value_heads


def _gone_by_kl(made: Build) -> list[tuple[int, ...]] | None:
    """By layer, the groups that go; chosen in the whole base model, so that one choice serves all depths."""
    wanted = made.plan.num_key_value_heads
    if made.plan.importance != "kl" or made.whole is None or wanted == made.own.num_key_value_heads:
        return None
    whole, base, family = made.whole, made.base, made.family
    energies = importance.group_energies(base, family, whole, made.device)
    gone = heads_by_kl.choose(base, family, whole.windows(), energies, wanted, whole.path, made.device, say=made.say)
    return [gone[layer] for layer in made.layers]


def _cut(made: Build, kept: Sequence[Kept]) -> Build:
    family, size = made.family, head_dim(made.base.config)
    queries = [heads.inputs_of(of_layer, size) for of_layer in kept]
    keys = [heads.outputs_of(of_layer, size) for of_layer in kept]
    return made.with_kept(
        heads.cut(made.checkpoint, family, kept),
        inputs={family.o: queries},
        outputs={family.q: queries, family.k: keys, family.v: keys},
    )
