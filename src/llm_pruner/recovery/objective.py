"""The loss: what the text says next, mixed with what the teacher would say."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def task_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of -log softmax(logits)[token]; logits (n, vocabulary), tokens (n,)."""
    return F.cross_entropy(logits, tokens, reduction="sum")


def distillation_loss(
    logits: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_log_probabilities: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Sum over tokens of T^2 KL(p || q), with all but the teacher's k likeliest tokens as one.

    KL = sum_i p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest), where p and q are the
    teacher's and the student's probabilities at temperature T, i runs over the teacher's k
    likeliest tokens and the rest is what they leave of 1. It is never more than the divergence over
    the whole vocabulary, and equal to it if k is the vocabulary (arXiv 1503.02531 for the T^2).

    Args:
        logits: the student's, (n, vocabulary).
        teacher_ids: int64 of shape (n, k).
        teacher_log_probabilities: log p_i, shape (n, k).
        temperature: T.
    """
    log_q = F.log_softmax(logits / temperature, dim=-1).gather(1, teacher_ids)
    log_p = teacher_log_probabilities
    p = log_p.exp()
    divergence = (p * (log_p - log_q)).sum(-1)
    floor = 1e-6  # the rest may be nothing but rounding
    p_rest = (1 - p.sum(-1)).clamp_min(floor)
    q_rest = (1 - log_q.exp().sum(-1)).clamp_min(floor)
    divergence = divergence + p_rest * (p_rest.log() - q_rest.log())
    return temperature**2 * divergence.sum()
