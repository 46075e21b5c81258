"""Gradients of the calibration loss by autograd, safe in float16, and their sums over samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from llm_pruner.errors import UserError
from llm_pruner.importance.criterion import Criterion
from llm_pruner.importance.needs import Need, Sums, parameters_by_name, reduce_term
from llm_pruner.models.forward import run_for_logits
from llm_pruner.runtime.progress import track

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

    In float16 the cotangents, (tensor, factor) for each output, are first multiplied by a power of
    two that makes the largest entry large, because gradients of a language model lie around the
    smallest float16 number; if that overflows on the way, by smaller ones.

    Raises:
        UserError: the gradient overflows float16 with every multiplier; names the ``samples``.
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


class GradientSums:
    """Sums over samples of the gradient and of its square, for a few parameters.

    Float32, or float64 for float64 weights: squares of gradients do not fit narrower types.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], criterion: Criterion) -> None:
        self.parameters = dict(parameters)
        self._criterion = criterion
        self._first = self._zeros() if criterion.order != "second" else {}
        self._second = self._zeros() if criterion.order != "first" else {}

    def _zeros(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros(
                p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device
            )
            for name, p in self.parameters.items()
        }

    def add(self, gradients: Sequence[torch.Tensor | None], factor: float) -> None:
        """Add ``factor`` times the gradients, one per parameter, of one sample.

        Where only the first order is asked for, of any number of samples together.
        """
        for name, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            if self._first:
                self._first[name].add_(gradient, alpha=factor)
            if self._second:
                square = self._second[name]
                wide = gradient.to(square.dtype)
                square.addcmul_(wide, wide, value=factor * factor)

    def sums(self, needs: Mapping[str, Need], samples: int) -> dict[str, Sums]:
        """Return the sums of the criterion's term per tensor, and forget the gradients."""
        found: dict[str, Sums] = {}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                term = self._term(name, parameter.detach()).div_(samples)
                if self._criterion.reduction == "element":
                    term.abs_()
                found[name] = reduce_term(term, needs[name])
        return found

    def _term(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return g w, F w^2 / 2, or their difference, times the number of samples; in place."""
        if self._criterion.order == "first":
            return self._first.pop(name).mul_(weight)
        square = self._second.pop(name)
        if self._criterion.order == "second":
            return square.mul_(weight).mul_(weight).mul_(0.5)
        return square.mul_(weight).mul_(-0.5).add_(self._first.pop(name)).mul_(weight)


def batches(samples: int, size: int) -> list[slice]:
    """Cut ``samples`` into slices of at most ``size``."""
    return [slice(at, min(at + size, samples)) for at in range(0, samples, size)]


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


_TOKENS_WHOLE = 1024
"""Tokens that go through the whole model together."""


def whole_sums(
    model: nn.Module, input_ids: torch.Tensor, criterion: Criterion, needs: Mapping[str, Need]
) -> dict[str, Sums]:
    """Return the criterion's sums for every tensor of ``needs``.

    Args:
        model: with no parameter that requires a gradient.
        input_ids: shape (samples, seq_len), on the model's device.
        criterion: a taylor criterion.
        needs: tensor -> sums wanted.

    Raises:
        UserError: see ``score``.
    """
    known = parameters_by_name(model)
    parameters = {name: known[name] for name in needs}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    samples, length = input_ids.shape
    size = max(1, _TOKENS_WHOLE // length) if criterion.order == "first" else 1
    gradients = GradientSums(parameters, criterion)
    for part in track(batches(samples, size), "importance"):
        ids = input_ids[part]
        logits = run_for_logits(model, ids)
        cotangent = loss_cotangent(logits, ids, part.start)
        gradients.add(*pull_back([logits], list(parameters.values()), [cotangent], part))
    return gradients.sums(needs, samples)
