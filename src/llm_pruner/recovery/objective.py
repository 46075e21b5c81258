"""The loss: what the text says next, mixed with what the teacher would say, and its gradient.

Gradients are written out: one softmax, in place, instead of several passes over new tensors of the
size of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from llm_pruner.recovery.packing import Batch

LossAndGradient: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
"""A loss, and its gradient; None from what only scores."""

Objective = Callable[[torch.Tensor, slice], LossAndGradient]
"""Takes float32 logits (n, vocabulary), and which learned tokens of a batch they predict; returns
the sum of the tokens' losses and its gradient in the logits, which may take their place in memory.
"""

_FLOOR = 1e-6
"""Least probability of all tokens but the teacher's likeliest; less may be nothing but rounding."""


def task_loss_and_gradient_(
    logits: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of -log softmax(logits)[token], and its gradient in place of the logits."""
    own = logits.gather(1, tokens[:, None])
    log_total, gradient = _softmax_(logits)
    gradient.scatter_add_(1, tokens[:, None], torch.full_like(own, -1.0))
    return (log_total - own).sum(), gradient


class Targets(NamedTuple):
    """What some tokens' loss is made of.

    Attributes:
        tokens: what the text says next, int64 (n,).
        teacher_ids: the teacher's likeliest tokens, int64 (n, k).
        teacher_log_probabilities: of these, (n, k).
        temperature: T.
        weight: w, the share of the distillation loss.
    """

    tokens: torch.Tensor
    teacher_ids: torch.Tensor
    teacher_log_probabilities: torch.Tensor
    temperature: float
    weight: float


def mixed_loss_and_gradient_(
    logits: torch.Tensor, targets: Targets
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w * distillation loss + (1 - w) * task loss, and its gradient.

    The gradient takes the place of the logits (n, vocabulary). The distillation loss is the sum
    over tokens of T^2 KL(p || q), with all but the teacher's k likeliest tokens as one:

        KL = sum_i p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest),

    where p and q are the teacher's and the student's probabilities at temperature T, i runs over
    the teacher's k likeliest tokens and the rest is what they leave of 1. It is never more than the
    divergence over the whole vocabulary, and equal to it if k is the vocabulary (arXiv 1503.02531
    for the T^2).

    With P the sum of p_i, a = p_rest / q_rest (0 where q_rest is nothing but rounding) and q over
    the whole vocabulary, all at temperature T, the gradient of the distillation loss is T times

        (P - a (1 - q_rest)) q_j  +  (a q_j - p_j  where j is among the teacher's likeliest).
    """
    tokens, teacher_ids, teacher_log_probabilities, temperature, weight = targets
    task, task_gradient = None, None
    if weight < 1 and temperature != 1:
        task, task_gradient = task_loss_and_gradient_(logits.clone(), tokens)
    if temperature != 1:
        logits.div_(temperature)
    own = logits.gather(1, tokens[:, None])
    log_q = logits.gather(1, teacher_ids)
    log_total, gradient = _softmax_(logits)
    log_q = log_q - log_total
    loss = temperature**2 * weight * _divergence(log_q, teacher_log_probabilities)
    p, q = teacher_log_probabilities.exp(), log_q.exp()
    kept, q_rest = p.sum(-1), 1 - q.sum(-1)
    p_rest = (1 - kept).clamp_min(_FLOOR)
    ratio = torch.where(q_rest > _FLOOR, p_rest / q_rest.clamp_min(_FLOOR), 0.0)
    share = temperature * weight
    of_all = share * (kept - ratio * (1 - q_rest))
    of_kept = share * (ratio[:, None] * q - p)
    if weight < 1 and task is None:  # the same probabilities serve both
        task = (log_total - own).sum()
        of_all = of_all + (1 - weight)
        gradient.mul_(of_all[:, None]).scatter_add_(1, teacher_ids, of_kept)
        gradient.scatter_add_(1, tokens[:, None], torch.full_like(own, weight - 1))
    else:
        gradient.mul_(of_all[:, None]).scatter_add_(1, teacher_ids, of_kept)
        if task_gradient is not None:
            gradient.add_(task_gradient, alpha=1 - weight)
    return loss if task is None else loss + (1 - weight) * task, gradient


def _softmax_(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logsumexp, (n, 1), and softmax; the former from the latter spares an exponential."""
    most = logits.amax(-1, keepdim=True)
    # The CPU's kernel goes row by row, so that it may write where it reads.
    q = torch.softmax(logits, -1, out=logits) if logits.is_cpu else logits.softmax(-1)
    return most - q.amax(-1, keepdim=True).log(), q


def _divergence(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    p = log_p.exp()
    divergence = (p * (log_p - log_q)).sum(-1)
    p_rest = (1 - p.sum(-1)).clamp_min(_FLOOR)
    q_rest = (1 - log_q.exp().sum(-1)).clamp_min(_FLOOR)
    return (divergence + p_rest * (p_rest.log() - q_rest.log())).sum()


def divergence_and_gradient_(
    logits: torch.Tensor, of_teacher: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum over tokens of KL(p || q), and its gradient q - p in place of the logits.

    With s and t the student's and the teacher's logits, it is the sum of
    p (t - s) + log sum exp(s) - log sum exp(t).

    Args:
        logits: of q, float32 (n, vocabulary).
        of_teacher: of p, likewise.
    """
    p = of_teacher.softmax(-1)
    log_total_of_teacher = of_teacher.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
    gaps = (of_teacher - logits).mul_(p)
    loss = gaps.sum()
    if bool(loss.isnan()):  # of tokens that neither ever writes
        loss = gaps.masked_fill_(p == 0, 0).sum()
    log_total, gradient = _softmax_(logits)
    return loss + (log_total - log_total_of_teacher).sum(), gradient.sub_(p)


def text_objective(tokens: torch.Tensor) -> Objective:
    """Return the objective of what a text says next; tokens (learned tokens of a batch,)."""

    def objective(logits: torch.Tensor, span: slice) -> LossAndGradient:
        return task_loss_and_gradient_(logits, tokens[span].to(logits.device))

    return objective


class Guide(Protocol):
    """What says what a batch of its samples is to be trained on."""

    def objective(self, batch: Batch) -> Objective:
        """Return the objective of a batch."""
        ...

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Find out what is asked once alone, so that later scores take no longer than others."""
        ...


class WithGradient(torch.autograd.Function):
    """The loss of an objective on all logits at once, whose gradient the objective gives."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, objective: Objective) -> torch.Tensor:
        """Return the loss, and keep its gradient."""
        loss, gradient = objective(logits.clone(), slice(0, len(logits)))
        assert gradient is not None
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        """Scale the gradient."""
        (gradient,) = ctx.saved_tensors
        return upstream[0] * gradient, None
