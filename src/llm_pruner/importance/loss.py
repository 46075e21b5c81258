"""The calibration loss: its gradient at the logits, and how a gradient is pulled back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from llm_pruner.errors import UserError

_ROWS = 256
"""Rows of logits that are turned into float32 at a time."""

_START = 8
"""Power of two that the largest entry of a float16 cotangent is brought to at first."""

_BACKOFF = 2.0**-8
_ATTEMPTS = 5


def pull_back(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    cotangents: Sequence[tuple[torch.Tensor, float]],
    samples: slice,
) -> tuple[list[torch.Tensor | None], float]:
    """Return vector-Jacobian products as (gradients, factor): the true ones are their product.

    In float16 the cotangents, (tensor, factor) for each output, are multiplied by a power of two,
    since gradients of a language model lie around the smallest float16 number.
    """
    half = any(tensor.dtype == torch.float16 for tensor in (*outputs, *inputs))
    scale = 1.0
    if half:
        largest = max(float(tensor.abs().max()) * factor for tensor, factor in cotangents)
        if largest > 0.0 and math.isfinite(largest):
            scale = 2.0 ** (_START - math.frexp(largest)[1])
    for _ in range(_ATTEMPTS if half else 1):
        vectors = [
            (tensor if factor * scale == 1.0 else tensor * (factor * scale)).to(output.dtype)
            for output, (tensor, factor) in zip(outputs, cotangents, strict=True)
        ]
        gradients: list[torch.Tensor | None] = list(
            torch.autograd.grad(outputs, inputs, vectors, retain_graph=half, allow_unused=True)
        )
        if not half or all(bool(g.isfinite().all()) for g in gradients if g is not None):
            return gradients, 1.0 / scale
        scale *= _BACKOFF
    raise UserError(
        f"the gradient of calibration samples {samples.start} to {samples.stop - 1} overflows "
        "float16; load the model in bfloat16 or float32"
    )


def loss_cotangent(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    first_sample: int,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Return the gradient of the loss at the logits, as (cotangent, factor): their product.

    The loss of one sample is the mean cross-entropy of its predicted tokens (seq_len - 1, or one
    behind each of ``positions``), in float32; samples are summed. For float16 the factor holds the
    division by the token count, which would underflow in the cotangent.

    Args:
        logits: shape (samples, seq_len, vocabulary), or of ``positions`` alone.
        input_ids: shape (samples, seq_len).
    """
    half = logits.dtype == torch.float16
    targets = input_ids[:, 1:] if positions is None else input_ids[:, positions + 1]
    targets = targets.to(logits.device)
    samples, count = targets.shape
    scale = 1.0 / count
    cotangent = torch.zeros_like(logits, requires_grad=False)
    with torch.no_grad():
        for sample in range(samples):
            total = 0.0
            for start in range(0, count, _ROWS):
                rows = slice(start, min(start + _ROWS, count))
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
