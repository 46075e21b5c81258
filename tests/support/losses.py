"""The losses of recovery as they are defined, for autograd to differentiate."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def task_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, tokens, reduction="sum")


def distillation_loss(
    logits: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return T^2 KL(p || q), with all but the teacher's likeliest tokens as one."""
    log_q = (logits / temperature).log_softmax(-1).gather(1, ids)
    p, q = log_p.exp(), log_q.exp()
    p_rest, q_rest = ((1 - one.sum(-1)).clamp_min(1e-6) for one in (p, q))
    divergences = (p * (log_p - log_q)).sum(-1) + p_rest * (p_rest.log() - q_rest.log())
    return temperature**2 * divergences.sum()
