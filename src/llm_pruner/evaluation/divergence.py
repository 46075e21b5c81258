"""How far a model's predictions are from the dense model's, on text that nothing was fitted to.

Perplexity alone rewards a model for leaving the dense one: training on one kind of text lowers the
perplexity of the dense model, too. The divergence is zero for the dense model and for nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div

from llm_pruner.errors import UserError

_CHUNK_BYTES = 64 * 2**20  # float32 logits of one model that are compared at a time


@dataclass(frozen=True)
class Divergence:
    """What a model keeps of the dense model's predictions.

    Attributes:
        kl: mean over the predicted tokens of KL(dense || model) = sum_v p_v log(p_v / q_v), nats.
    """

    against: str
    kl: float
    kl_stderr: float | None
    changed: float
    changed_stderr: float | None
    perplexity: float
    perplexity_stderr: float | None = None
    dtype: str | None = None


def compare(dense: torch.Tensor, model: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return sums over a window's tokens: KL, changed first choices, the dense model's loss.

    Args:
        dense, model: logits, shape (tokens, vocabulary).
        targets: the tokens that follow, shape (tokens,).

    Returns:
        Shape (3,), float64, on the CPU.
    """
    chunk = max(1, _CHUNK_BYTES // (4 * dense.shape[-1]))
    totals = torch.zeros(3, dtype=torch.float64, device="cpu")
    parts = (one.split(chunk) for one in (dense, model, targets))
    for before, after, target in zip(*parts, strict=True):
        # A token that is never written has minus infinity, of which no difference is to be taken.
        p, q = (
            one.float().log_softmax(-1).clamp_min(torch.finfo(torch.float16).min)
            for one in (before, after)
        )
        totals += torch.stack(
            [
                kl_div(q, p, log_target=True, reduction="none").sum(-1).double().sum(),
                (p.argmax(-1) != q.argmax(-1)).double().sum(),
                -p.gather(-1, target[:, None]).double().sum(),
            ]
        ).cpu()
    return totals


def divergence(
    against: str, sums: torch.Tensor, tokens: int, dtype: str | None = None
) -> Divergence:
    """Return the divergence from what ``compare`` gave of each window of ``tokens``, (windows, 3).

    ``against`` and ``dtype`` are the dense model's. Raises UserError if a sum is not finite.
    """
    values = sums / tokens
    if not values.isfinite().all():
        raise UserError(
            f"the divergence from {against} is not finite; one of the models is broken or "
            "overflows: try float32 or bfloat16"
        )
    kl, changed, nll = values.mean(0).tolist()
    errors = (values.std(0) / math.sqrt(len(values))).tolist() if len(values) > 1 else [None] * 3
    value = math.exp(nll)
    spread = None if errors[2] is None else value * errors[2]
    kl = max(kl, 0.0)  # of equal models it may be rounded below
    return Divergence(against, kl, errors[0], changed, errors[1], value, spread, dtype)
