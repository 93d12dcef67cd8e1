"""Which FFN channels, key/value groups and query heads stay, by the second moment of what reads them.

Symbols: W [N, K] the projection that reads them (down_proj, o_proj), H [K, K] the second moment of its input, μ its
mean.
A channel is one input of down_proj; a head is a block of head_dim inputs of o_proj.

energy: E‖W[:, P] x_P‖² = tr(W[:, P] H[P, P] W[:, P]ᵀ) of the inputs P: what they add to the output, and what is lost
    when they go and nothing takes over.
flap: (H[j, j] − μ[j]²) ‖W[:, j]‖², https://arxiv.org/abs/2312.11983.
obs: the loss E‖W x − W' x_S‖² that is left after the best W', of those that go one after the other: OBS,
    https://arxiv.org/abs/2208.11580 (the block of a head: ZipLM, https://arxiv.org/abs/2302.04089).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressors.methods import heads
from compressors.methods.heads import Kept
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import Family, head_dim
from compressors.statistics.second_moments import Moment, Moments, mixed

DAMPING = 1e-2  # × the median of diag H


def flap(weight: torch.Tensor, moment: Moment) -> torch.Tensor:
    """Of each input, float64 [K]."""
    variance = (moment.second.diagonal().double() - moment.mean.double().square()).clamp_min(0.0)
    return variance * weight.double().square().sum(0)


def energy(weight: torch.Tensor, moment: Moment, size: int = 1) -> torch.Tensor:
    """Of each block of `size` inputs, float64 [K / size]."""
    rows, width = weight.shape
    blocks = weight.double().reshape(rows, -1, size)  # (N, K / size, size)
    second = moment.second.double().reshape(width // size, size, width // size, size)
    own = second.diagonal(dim1=0, dim2=2)  # (size, size, K / size)
    return torch.einsum("nki,ijk,nkj->k", blocks, own, blocks).clamp_min(0.0)


def energy_choice(weight: torch.Tensor, moment: Moment, keep: int) -> torch.Tensor:
    """The inputs that stay, int64 [keep], ascending."""
    return _largest(energy(weight, moment), keep)


def flap_choice(weight: torch.Tensor, moment: Moment, keep: int) -> torch.Tensor:
    """The inputs that stay, int64 [keep], ascending."""
    return _largest(flap(weight, moment), keep)


def _largest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    return torch.topk(scores, keep).indices.sort().values


def obs_choice(weight: torch.Tensor, moment: Moment, keep: int) -> torch.Tensor:
    """The inputs that stay, int64 [keep], ascending: the one of least loss goes, again and again."""
    inverse, weight = _inverse(moment), weight.double().clone()
    width = weight.shape[1]
    there = torch.ones(width, dtype=torch.bool, device=weight.device)
    for _ in range(width - keep):
        loss = weight.square().sum(0) / inverse.diagonal()
        loss[~there] = torch.inf
        gone = int(loss.argmin())
        _remove(weight, inverse, torch.tensor([gone], device=weight.device))
        there[gone] = False
    return there.nonzero()[:, 0]


def block_loss(weight: torch.Tensor, inverse: torch.Tensor, block: torch.Tensor) -> float:
    """tr(W_P (H⁻¹[P, P])⁻¹ W_Pᵀ): what is lost when the inputs P go and all others take over."""
    part = weight[:, block]
    return float((part * torch.linalg.solve(inverse[block][:, block], part.T).T).sum())


def _inverse(moment: Moment) -> torch.Tensor:
    second = moment.second.double()
    damping = DAMPING * float(second.diagonal().median().clamp_min(1e-30))
    inverse: torch.Tensor = torch.linalg.inv(
        second + damping * torch.eye(len(second), dtype=torch.float64, device=second.device)
    )
    return inverse


def _remove(weight: torch.Tensor, inverse: torch.Tensor, block: torch.Tensor) -> None:
    """The others take over from `block` [P], in place, and the inverse becomes that of what is left."""
    solved = torch.linalg.solve(inverse[block][:, block], inverse[block])  # (P, K)
    weight -= weight[:, block] @ solved
    inverse -= inverse[:, block] @ solved
    weight[:, block] = 0.0
    inverse[:, block] = 0.0
    inverse[block] = 0.0
    inverse[block, block] = 1.0  # gone: never divides by zero


# -- for every layer of a checkpoint -------------------------------------------------------------------------


def choose_channels(
    checkpoint: Checkpoint, family: Family, keep: int, moments: Moments, how: str, device: str = "cpu"
) -> list[torch.Tensor]:
    """The FFN channels that stay in each layer, int64 [keep], ascending.

    how: energy | flap | obs. device: of the arithmetic.
    """
    choice = {"energy": energy_choice, "flap": flap_choice, "obs": obs_choice}[how]
    found = []
    for layer in range(int(checkpoint.config["num_hidden_layers"])):
        weight = checkpoint.tensors[f"{family.in_layer(layer, family.down)}.weight"].load().to(device)
        found.append(choice(weight, mixed(moments.of(layer, family.down, device)), keep).cpu())
    return found


def choose_heads(
    checkpoint: Checkpoint,
    family: Family,
    keep_heads: int,
    keep_groups: int,
    moments: Moments,
    how: str,
    device: str = "cpu",
    gone: Sequence[tuple[int, ...]] | None = None,
) -> list[Kept]:
    """The heads that stay in each layer: first whole key/value groups go, then as many query heads of each group.

    how: energy | flap | obs. device: of the arithmetic. gone: the groups that go, by layer, where something else has
    chosen them; with energy alone.
    """
    config = checkpoint.config
    count, size = int(config["num_attention_heads"]), head_dim(config)
    groups = int(config.get("num_key_value_heads") or count)
    found = []
    for layer in range(int(config["num_hidden_layers"])):
        weight = checkpoint.tensors[f"{family.in_layer(layer, family.o)}.weight"].load().to(device)
        moment = mixed(moments.of(layer, family.o, device))
        if how == "energy":
            of_groups = energy(weight, moment, size * count // groups).tolist()
            if gone is not None:
                of_groups = [0.0 if group in gone[layer] else 1.0 for group in range(groups)]
            of_heads = energy(weight, moment, size).tolist()
            found.append(heads.choose(count, groups, keep_heads, keep_groups, of_heads, of_groups))
        elif how == "flap":
            fluctuation = flap(weight, moment).reshape(count, size).sum(1).sqrt()
            found.append(heads.choose(count, groups, keep_heads, keep_groups, fluctuation.tolist()))
        else:
            found.append(_heads_by_obs(weight, moment, count, groups, keep_heads, keep_groups, size))
    return found


def group_energy(checkpoint: Checkpoint, family: Family, moments: Moments, device: str = "cpu") -> list[list[float]]:
    """By layer, of each key/value group: what its heads add to o_proj's output."""
    config = checkpoint.config
    count = int(config["num_attention_heads"])
    width = head_dim(config) * count // int(config.get("num_key_value_heads") or count)
    found = []
    for layer in range(int(config["num_hidden_layers"])):
        weight = checkpoint.tensors[f"{family.in_layer(layer, family.o)}.weight"].load().to(device)
        found.append(energy(weight, mixed(moments.of(layer, family.o, device)), width).tolist())
    return found


def _heads_by_obs(
    weight: torch.Tensor, moment: Moment, count: int, groups: int, keep_heads: int, keep_groups: int, size: int
) -> Kept:
    each, keep_each = count // groups, keep_heads // keep_groups

    def inputs_of(head: int) -> list[int]:
        return list(range(head * size, (head + 1) * size))

    members = [list(range(group * each, (group + 1) * each)) for group in range(groups)]
    inverse, weight = _inverse(moment), weight.double().clone()
    left = set(range(groups))
    for _ in range(groups - keep_groups):
        blocks = {group: torch.tensor([i for head in members[group] for i in inputs_of(head)]) for group in left}
        gone = min(sorted(left), key=lambda group: block_loss(weight, inverse, blocks[group]))
        _remove(weight, inverse, blocks[gone])
        left.remove(gone)
    kept = {group: list(members[group]) for group in sorted(left)}
    while any(len(those) > keep_each for those in kept.values()):
        going = [head for those in kept.values() if len(those) > keep_each for head in those]
        gone = min(going, key=lambda head: block_loss(weight, inverse, torch.tensor(inputs_of(head))))
        _remove(weight, inverse, torch.tensor(inputs_of(gone)))
        kept[gone // each].remove(gone)
    return tuple((group, tuple(those)) for group, those in kept.items())
