"""The calibration loss and its gradient at the logits."""

from __future__ import annotations

import math

import torch

from llm_pruner.errors import UserError

_ROWS = 256
"""Rows of logits that are turned into float32 at a time."""


def loss_cotangent(
    logits: torch.Tensor, input_ids: torch.Tensor, first_sample: int
) -> tuple[torch.Tensor, float]:
    """Return the gradient of the loss at the logits, as (cotangent, factor): their product.

    The loss of one sample is the mean over its seq_len - 1 predicted tokens of the cross-entropy,
    in float32; the gradient is that of the sum over the samples given. For float16 the factor
    holds the division by the token count, which would underflow in the cotangent.

    Args:
        logits: shape (samples, seq_len, vocabulary).
        input_ids: shape (samples, seq_len).
        first_sample: number of the first sample, for the message.

    Raises:
        UserError: the loss of a sample is NaN or infinite.
    """
    samples, length = input_ids.shape
    scale = 1.0 / (length - 1)
    half = logits.dtype == torch.float16
    targets = input_ids[:, 1:].to(logits.device)
    cotangent = torch.zeros_like(logits, requires_grad=False)
    with torch.no_grad():
        for sample in range(samples):
            total = 0.0
            for start in range(0, length - 1, _ROWS):
                rows = slice(start, min(start + _ROWS, length - 1))
                target = targets[sample, rows, None]
                values = logits[sample, rows]
                values = values.to(torch.promote_types(values.dtype, torch.float32))
                log_probs = torch.log_softmax(values, -1)
                total -= float(log_probs.gather(-1, target).sum())
                gradient = log_probs.exp_()
                gradient.scatter_add_(-1, target, -torch.ones_like(target, dtype=gradient.dtype))
                cotangent[sample, rows] = gradient if half else gradient.mul_(scale)
            if not math.isfinite(total):
                raise UserError(
                    f"the loss of calibration sample {first_sample + sample} is {total * scale}, "
                    "so nothing can be scored; look at this sample, or load the model in float32"
                )
    return cotangent, (scale if half else 1.0)
