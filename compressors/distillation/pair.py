"""Run a student and its teacher on a device: master weights, a batch's gradient, updates, the held-out KL.

Models compute in float32, or in bfloat16 with float32 master weights of the student. Then the model holds a bfloat16
copy, its gradients are added up in float32 micro-batch by micro-batch, and every update changes the masters. (Under
autocast, the norms' float32 gains would make the whole residual stream float32.)

Symbols: B windows of a micro-batch, T tokens of a window, E hidden size, V vocabulary. Knows no schedule and no state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from compressors.distillation import loss as distill_loss
from compressors.errors import CheckpointError
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import family_of

PROBE_TOKENS = 16  # the number of tokens on which the logits are compared


@dataclasses.dataclass
class Pair:
    """Pair holds both models and the student's master weights.

    Attributes:
        student: The stock transformers model to train.
        teacher: The stock transformers model to learn from.
        masters: The student's weights by name, float32; in float32 these are the model's own parameters.
        layers: The decoder layers of the student and of the teacher.
        dtype: The dtype that both compute in.
        device: The device of both.
        of_chunk: The loss of a chunk, compiled or not.
    """

    student: Any
    teacher: Any
    masters: dict[str, torch.Tensor]
    layers: tuple[Any, Any]  # the decoder layers of each
    dtype: torch.dtype
    device: str
    of_chunk: distill_loss.OfChunk = distill_loss.loss_and_gradient

    @property
    def copies(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters that the student computes with, by name."""
        return dict(self.student.named_parameters())


def make(student: Checkpoint, teacher: Checkpoint, dtype: torch.dtype, device: str) -> Pair:
    """Load both models on the device, the student ready for gradients.

    Raises:
        CheckpointError: When a checkpoint's family is unknown or its tensors don't match its config.
    """
    prefixes = family_of(student).layers, family_of(teacher).layers
    taught = student.to_model(device, torch.float32)
    teaching = teacher.to_model(device, dtype)
    masters: dict[str, torch.Tensor] = {}
    for name, parameter in taught.named_parameters():
        parameter.data = parameter.data.clone()  # a float32 tensor may be the checkpoint's own
        masters[name] = parameter
        if dtype != torch.float32:
            masters[name] = parameter.data
            parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(True)
        if dtype != torch.float32:
            parameter.register_post_accumulate_grad_hook(functools.partial(_add_up, masters[name]))
    return Pair(
        taught,
        teaching,
        masters,
        (taught.get_submodule(prefixes[0]), teaching.get_submodule(prefixes[1])),
        dtype,
        device,
    )


def _add_up(master: torch.Tensor, parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        if master.grad is None:
            master.grad = parameter.grad.to(master.dtype)
        else:
            master.grad += parameter.grad
        parameter.grad = None


@torch.no_grad()
def require_plain_logits(pair: Pair, window: torch.Tensor) -> None:
    """Check on a window's first tokens [T] that logits are the output embedding times the last hidden states.

    Raises:
        CheckpointError: When they are not, or not finite.
    """
    ids = window[None, :PROBE_TOKENS].to(pair.device)
    for whose, model in (("student", pair.student), ("teacher", pair.teacher)):
        head = model.get_output_embeddings()
        given = model(input_ids=ids, use_cache=False).logits[0].float()  # (T, V)
        computed = distill_loss.logits(last_hidden(model, ids)[0], head.weight)
        if not torch.isfinite(given).all():
            raise CheckpointError(
                f"distill: the {whose}'s logits are NaN or infinite before training; its weights are broken, build it "
                "again"
            )
        rounding = 1e-4 if pair.dtype == torch.float32 else 2e-2  # relative to the largest logit
        apart = float((given - computed).abs().max())
        if getattr(head, "bias", None) is not None or apart > rounding * float(given.abs().max()):
            raise CheckpointError(
                f"distill: the {whose}'s logits are not its output embedding times its last hidden states (they differ "
                f"by up to {apart:.3g}: capped, scaled or biased); such a model can't be distilled here"
            )


def backward(pair: Pair, ids: torch.Tensor, share: float, temperature: float, weight_ce: float, chunk: int) -> float:
    """Add `share` of the mean loss' gradient over windows [B, T] to the masters' `grad`, and return the mean loss.

    Args:
        pair: Both models.
        ids: The token ids, [B, T].
        share: The share of the batch that these windows are.
        temperature: The temperature of the KL divergence.
        weight_ce: The weight of the cross-entropy.
        chunk: The number of positions whose logits are held at once.
    """
    with torch.no_grad():
        teacher_hidden = _predicting(last_hidden(pair.teacher, ids))
    loss = distill_loss.distillation_loss(
        _predicting(last_hidden(pair.student, ids)),
        pair.student.get_output_embeddings().weight,
        teacher_hidden,
        pair.teacher.get_output_embeddings().weight,
        ids[:, 1:].reshape(-1),
        temperature=temperature,
        weight_ce=weight_ce,
        chunk=chunk,
        of_chunk=pair.of_chunk,
    )
    (loss * share).backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


@torch.no_grad()
def update(pair: Pair, optimizer: torch.optim.Optimizer, grad_clip: float) -> bool:
    """Take the optimizer's step with the added gradients, scaled to a norm of at most `grad_clip`.

    Returns:
        Whether the gradients were finite; else nothing is changed.
    """
    norm = torch.nn.utils.clip_grad_norm_(list(pair.masters.values()), grad_clip)
    finite = bool(torch.isfinite(norm))
    if finite:
        optimizer.step()
        copy_masters(pair)
    optimizer.zero_grad(set_to_none=True)
    return finite


@torch.no_grad()
def copy_masters(pair: Pair) -> None:
    """Round the masters into the model that computes."""
    if pair.dtype != torch.float32:
        copies = pair.copies
        torch._foreach_copy_([copies[name].data for name in pair.masters], list(pair.masters.values()))


@torch.no_grad()
def held_out_kl(pair: Pair, windows: torch.Tensor, together: int, chunk: int, tick: Callable[[], None]) -> float:
    """Return KL(teacher ‖ student) at temperature 1 over the predicted tokens of windows [N, T], in nats per token.

    Args:
        pair: Both models.
        windows: The token ids, [N, T].
        together: The number of windows that run at once.
        chunk: The number of positions whose logits are held at once.
        tick: A function that is called after each group of windows.
    """
    total = 0.0
    for ids in torch.split(windows, together):
        ids = ids.to(pair.device)
        total += distill_loss.kl_sum(
            _predicting(last_hidden(pair.student, ids)),
            pair.student.get_output_embeddings().weight,
            _predicting(last_hidden(pair.teacher, ids)),
            pair.teacher.get_output_embeddings().weight,
            chunk,
        )
        tick()
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def last_hidden(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states [B, T, E] after the final norm."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]  # (B, T, E)


def _predicting(hidden: torch.Tensor) -> torch.Tensor:
    """Return the positions that have a next token: [B, T, E] → [B·(T − 1), E]."""
    return hidden[:, :-1].reshape(-1, hidden.shape[-1])


def multiplied(checkpoint: Checkpoint) -> int:
    """Return N, the number of weights that every token is multiplied by: all matrices, except an untied embedding."""
    family = family_of(checkpoint)
    tied = checkpoint.config.get("tie_word_embeddings", False)
    return sum(
        shape[0] * shape[1]
        for name, shape in checkpoint.shapes.items()
        if len(shape) == 2 and (tied or name != f"{family.embedding}.weight")
    )


# -- the optimizer -------------------------------------------------------------------------------------------


def optimizer_of(pair: Pair, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW over the masters (betas 0.9 and 0.95, fused on CUDA); only matrices are decayed, no embedding."""
    embedding = pair.student.get_input_embeddings().weight
    spared = {name for name, parameter in pair.copies.items() if parameter.ndim < 2 or parameter is embedding}
    groups = [
        {"params": [pair.masters[name] for name in pair.masters if name not in spared], "weight_decay": weight_decay},
        {"params": [pair.masters[name] for name in pair.masters if name in spared], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=pair.device.startswith("cuda") or None)


def to_tensors(pair: Pair, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the masters and both of AdamW's moments for a file; there are no moments before the first update."""
    tensors: dict[str, torch.Tensor] = {}
    for name, master in pair.masters.items():
        tensors[f"weight.{name}"] = master
        for moment, value in optimizer.state.get(master, {}).items():
            if moment != "step":
                tensors[f"{moment}.{name}"] = value
    return tensors


@torch.no_grad()
def from_tensors(
    pair: Pair, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Callable[[], torch.Tensor]], updates: int
) -> None:
    """Load what `to_tensors` returned into the masters, the model and the optimizer.

    Raises:
        KeyError: When a tensor is missing.
    """
    names = {id(master): name for name, master in pair.masters.items()}
    for name, master in pair.masters.items():
        master.copy_(tensors[f"weight.{name}"]())
    copy_masters(pair)
    if updates:
        groups = optimizer.state_dict()["param_groups"]
        in_order = [names[id(master)] for group in optimizer.param_groups for master in group["params"]]
        state = {
            number: {
                "step": torch.tensor(float(updates)),
                "exp_avg": tensors[f"exp_avg.{name}"]().to(pair.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"]().to(pair.device),
            }
            for number, name in enumerate(in_order)
        }
        optimizer.load_state_dict({"state": state, "param_groups": groups})
