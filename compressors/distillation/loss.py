"""Compute the loss of distillation, a few positions' logits at a time.

Symbols: P positions, E hidden size (the teacher's may differ), V vocabulary, C positions of a chunk, T temperature.
With logits s of the student and t of the teacher at a position, and y the true next token,

    loss = T² · KL(softmax(t/T) ‖ softmax(s/T)) + w · CE(s, y)
    ∂loss/∂s = T · (softmax(s/T) − softmax(t/T)) + w · (softmax(s) − onehot(y))

Hinton et al., https://arxiv.org/abs/1503.02531, section 2: the factor T² keeps the gradients' size at any temperature.
Knows no model and no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

OfChunk = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def distillation_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    weight_ce: float = 0.0,
    chunk: int = 2048,
    of_chunk: OfChunk | None = None,
) -> torch.Tensor:
    """Return the mean loss over P positions in nats, a scalar that is differentiable by `hidden` and `head`.

    Gradients are computed along with the loss, so only the logits of `chunk` positions are held at once. Softmax and
    sums are in float32, or float64 for float64 inputs.

    Args:
        hidden: The student's last hidden states after the final norm, [P, E].
        head: The student's output embedding, [V, E].
        teacher_hidden: The teacher's last hidden states, [P, E'].
        teacher_head: The teacher's output embedding, [V, E'].
        targets: The true next tokens, int64 [P].
        temperature: T.
        weight_ce: w.
        chunk: C, the number of positions whose logits are held at once.
        of_chunk: `loss_and_gradient`, or a compiled version of it.
    """
    return _ChunkedLoss.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        targets,
        (temperature, weight_ce, chunk, of_chunk or loss_and_gradient),
    )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_head: torch.Tensor,
        targets: torch.Tensor,
        how: tuple[float, float, int, OfChunk],
    ) -> torch.Tensor:
        temperature, weight_ce, chunk, of_chunk = how
        positions = len(hidden)
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (P, E)
        of_head = torch.zeros_like(head, dtype=_wide(head)) if ctx.needs_input_grad[1] else None  # (V, E)
        for rows in _rows(positions, chunk):
            loss, gradient = of_chunk(
                logits(hidden[rows], head),
                logits(teacher_hidden[rows], teacher_head),
                targets[rows],
                temperature,
                weight_ce,
            )  # (), (C, V)
            total += loss
            gradient = gradient.to(hidden.dtype)
            if of_hidden is not None:
                of_hidden[rows] = gradient @ head
            if of_head is not None:
                of_head += _wide_product(gradient.t(), hidden[rows])
        ctx.positions = positions
        ctx.save_for_backward(of_hidden, of_head)
        return total / positions

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        of_hidden, of_head = ctx.saved_tensors
        scale = outputs[0] / ctx.positions
        dtype = of_hidden.dtype if of_hidden is not None else None
        return (
            None if of_hidden is None else of_hidden * scale.to(dtype),
            None if of_head is None else (of_head * scale).to(dtype or of_head.dtype),
            None,
            None,
            None,
            None,
        )


def loss_and_gradient(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temperature: float, weight_ce: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the sum of the loss over C positions, its gradient by the student's logits [C, V]).

    Args:
        student: The student's logits, [C, V].
        teacher: The teacher's logits, [C, V].
        targets: The true next tokens, [C].
        temperature: T.
        weight_ce: w.
    """
    log_s = torch.log_softmax(student / temperature, dim=-1)
    log_t = torch.log_softmax(teacher / temperature, dim=-1)
    p_t = log_t.exp()
    loss = (p_t * (log_t - log_s)).sum() * temperature**2
    gradient = (log_s.exp() - p_t) * temperature
    if weight_ce:
        log_p = log_s if temperature == 1 else torch.log_softmax(student, dim=-1)
        loss = loss - weight_ce * log_p.gather(1, targets[:, None]).sum()
        is_target = torch.arange(student.shape[1], device=student.device) == targets[:, None]
        gradient = gradient + weight_ce * (log_p.exp() - is_target.to(log_p.dtype))
    return loss, gradient


@torch.no_grad()
def kl_sum(
    hidden: torch.Tensor, head: torch.Tensor, teacher_hidden: torch.Tensor, teacher_head: torch.Tensor, chunk: int
) -> float:
    """Return Σ KL(teacher ‖ student) over P positions at temperature 1 in nats; arguments as in `distillation_loss`."""
    total = 0.0
    for rows in _rows(len(hidden), chunk):
        log_s = torch.log_softmax(logits(hidden[rows], head), dim=-1)
        log_t = torch.log_softmax(logits(teacher_hidden[rows], teacher_head), dim=-1)
        total += float((log_t.exp() * (log_t - log_s)).sum(dim=-1).double().sum())
    return total


def logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return the logits [C, V] in float32 (float64 for float64), without rounding to 16 bits in between."""
    return _wide_product(hidden, head.t())


def _wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    wide = _wide(a)
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _rows(positions: int, chunk: int) -> Iterator[slice]:
    for start in range(0, positions, chunk):
        yield slice(start, min(start + chunk, positions))
