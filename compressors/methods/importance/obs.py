"""The loss E‖W x − W' x_S‖² that is left after the best W', of inputs that go one after the other.

OBS: https://arxiv.org/abs/2208.11580; for the block of a head, ZipLM: https://arxiv.org/abs/2302.04089.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressors.methods.heads import Kept
from compressors.methods.importance import HeadCounts, Reader
from compressors.statistics.second_moments import Moment

DAMPING = 1e-2  # × the median of diag H


def channels(reader: Reader, keep: int) -> torch.Tensor:
    """Remove the channel of least loss, again and again."""
    inverse, weight = _inverse(reader.moment), reader.weight.double().clone()
    width = weight.shape[1]
    stays = torch.ones(width, dtype=torch.bool, device=weight.device)
    for _ in range(width - keep):
        loss = weight.square().sum(0) / inverse.diagonal()
        loss[~stays] = torch.inf
        least = int(loss.argmin())
        _remove(weight, inverse, torch.tensor([least], device=weight.device))
        stays[least] = False
    return stays.nonzero()[:, 0]


def heads(reader: Reader, counts: HeadCounts, gone: Sequence[int] | None = None) -> Kept:
    """Remove the group of least loss, again and again, then query heads of the groups that still have too many."""
    each, keep_each = counts.heads // counts.groups, counts.keep_heads // counts.keep_groups

    def inputs_of(head: int) -> list[int]:
        return list(range(head * counts.size, (head + 1) * counts.size))

    members = [list(range(group * each, (group + 1) * each)) for group in range(counts.groups)]
    inverse, weight = _inverse(reader.moment), reader.weight.double().clone()
    left, going_groups = set(range(counts.groups)), list(gone or ())
    for _ in range(counts.groups - counts.keep_groups):
        blocks = {group: torch.tensor([i for head in members[group] for i in inputs_of(head)]) for group in left}
        least = (
            going_groups.pop(0)
            if going_groups
            else min(sorted(left), key=lambda group: block_loss(weight, inverse, blocks[group]))
        )
        _remove(weight, inverse, blocks[least])
        left.remove(least)
    kept = {group: list(members[group]) for group in sorted(left)}
    while any(len(queries) > keep_each for queries in kept.values()):
        going = [head for queries in kept.values() if len(queries) > keep_each for head in queries]
        least = min(going, key=lambda head: block_loss(weight, inverse, torch.tensor(inputs_of(head))))
        _remove(weight, inverse, torch.tensor(inputs_of(least)))
        kept[least // each].remove(least)
    return tuple((group, tuple(queries)) for group, queries in kept.items())


def block_loss(weight: torch.Tensor, inverse: torch.Tensor, block: torch.Tensor) -> float:
    """Return tr(W_P (H⁻¹[P, P])⁻¹ W_Pᵀ): what is lost when the inputs P go and all others take over."""
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
    """Let the others take over from `block` [P], in place; the inverse becomes that of what is left."""
    solved = torch.linalg.solve(inverse[block][:, block], inverse[block])  # (P, K)
    weight -= weight[:, block] @ solved
    inverse -= inverse[:, block] @ solved
    weight[:, block] = 0.0
    inverse[:, block] = 0.0
    inverse[block] = 0.0
    inverse[block, block] = 1.0  # it is gone: never divide by zero
