"""How far a model's predictions are from the dense model's, on text that nothing was fitted to.

Perplexity alone rewards a model for leaving the dense one: training on one kind of text lowers the
perplexity of the dense model, too. The divergence is zero for the dense model and for nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import kl_div

from llm_pruner.errors import UserError
from llm_pruner.models.forward import evaluating
from llm_pruner.runtime.progress import track

_CHUNK_BYTES = 64 * 2**20  # float32 logits of one model that are compared at a time


@dataclass(frozen=True)
class Divergence:
    """What a model keeps of the dense model's predictions.

    Attributes:
        against: name of the dense model.
        kl: mean over the predicted tokens of KL(dense || model) = sum_v p_v log(p_v / q_v), in nats.
        kl_stderr: its standard error, from the spread between windows; None for a single window.
        changed: share of the tokens whose likeliest continuation is another one.
        changed_stderr: its standard error, likewise.
        perplexity: the dense model's, on the same windows.
    """

    against: str
    kl: float
    kl_stderr: float | None
    changed: float
    changed_stderr: float | None
    perplexity: float


@torch.no_grad()
def divergence(
    model: Any, dense: Any, name: str, rows: torch.Tensor, skipped: int, batch_size: int, what: str
) -> Divergence:
    """Compare the predictions of two models on windows of text.

    Args:
        model, dense: with the same tokens.
        name: of the dense model.
        rows: token ids, int64 of shape (windows, window).
        skipped: tokens at the start of a window that are not predicted.
        batch_size: windows that are run at once.
        what: name of the text.

    Raises:
        UserError: the models have not the same tokens, or a number is not finite.
    """
    sums: list[torch.Tensor] = []
    with evaluating(model), evaluating(dense):
        for batch in track(torch.split(rows, batch_size), f"Divergence on {what}"):
            after, before = (_logits(one, batch) for one in (model, dense))
            if after.shape != before.shape:
                raise UserError(
                    f"{name} predicts {before.shape[-1]} tokens and the model {after.shape[-1]}, so "
                    "they cannot be compared; give --against the model that it was made of"
                )
            sums += [
                _compare(p[skipped - 1 : -1], q[skipped - 1 : -1], tokens[skipped:])
                for p, q, tokens in zip(before, after, batch, strict=True)
            ]
    values = torch.stack(sums) / (rows.shape[1] - skipped)
    if not values.isfinite().all():
        raise UserError(
            f"the divergence from {name} on {what} is not finite; one of the models is broken or "
            "overflows: try float32 or bfloat16"
        )
    kl, changed, nll = values.mean(0).tolist()
    errors = (values.std(0) / math.sqrt(len(values))).tolist() if len(values) > 1 else [None] * 3
    return Divergence(name, kl, errors[0], changed, errors[1], math.exp(nll))


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    logits: torch.Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
    return logits.cpu()


def _compare(before: torch.Tensor, after: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return sums over tokens: KL, changed first choices, the dense model's loss; float64."""
    chunk = max(1, _CHUNK_BYTES // (4 * before.shape[-1]))
    totals = torch.zeros(3, dtype=torch.float64)
    for p, q, target in zip(
        before.split(chunk), after.split(chunk), targets.split(chunk), strict=True
    ):
        dense, model = p.float().log_softmax(-1), q.float().log_softmax(-1)
        totals[0] += kl_div(model, dense, log_target=True, reduction="none").sum(-1).double().sum()
        totals[1] += (dense.argmax(-1) != model.argmax(-1)).sum()
        totals[2] -= dense.gather(-1, target[:, None]).double().sum()
    return totals
