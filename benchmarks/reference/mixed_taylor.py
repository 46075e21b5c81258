"""The gradients of LLM-Pruner's mixed-order Taylor as its script takes them, written from what it
does (section 3.2 of arXiv 2305.11627): a backward pass for each sample, whose squared gradients are
added up weight by weight, then one more over all of them (here ``BATCH`` at a time).
"""

from __future__ import annotations

from typing import Any

import torch

BATCH = 16


def mixed_scores(model: Any, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return |g w - (F w^2) / 2| of every weight, F the mean of squared gradients.

    Args:
        model: whose weights all get gradients.
        input_ids: shape (samples, seq_len).
    """
    squares: dict[str, torch.Tensor] = {}
    for sample in input_ids:
        loss = model(input_ids=sample[None], labels=sample[None], use_cache=False).loss
        loss.backward()
        for name, weight in model.named_parameters():
            square = weight.grad.detach() * weight.grad.detach() / len(input_ids)
            squares[name] = squares[name] + square if name in squares else square
        model.zero_grad()
    for batch in input_ids.split(BATCH):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        (loss * len(batch) / len(input_ids)).backward()
    return {
        name: (weight.grad * weight - 0.5 * squares[name] * weight * weight).abs().detach()
        for name, weight in model.named_parameters()
    }
