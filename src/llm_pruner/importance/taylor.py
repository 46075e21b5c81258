"""Sums of the terms of a Taylor expansion of the loss: gradients of weights, and their squares.

Gradients add up over samples, so several samples go through a block together. Their squares do not:
for the second order one sample goes at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from llm_pruner.importance.boundary_pass import run_backward
from llm_pruner.importance.collector import Collector
from llm_pruner.importance.criteria import Criterion
from llm_pruner.models.activation_store import HiddenStates
from llm_pruner.models.blockwise import NotBlockwise, find_chain
from llm_pruner.types import FloatArray

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sums:
    """Sums of a term over one tensor, in float64.

    Attributes:
        by_dim: for each axis, shape (size of the axis,), the term summed over all other axes.
        total: sum over the whole tensor.
    """

    by_dim: tuple[FloatArray, ...]
    total: float


def reduced(term: torch.Tensor) -> Sums:
    """Return the sums over a tensor."""
    vectors = []
    for dim in range(term.ndim):
        others = [axis for axis in range(term.ndim) if axis != dim]
        vector = term.sum(others) if others else term
        vectors.append(vector.double().cpu().numpy().copy())
    return Sums(tuple(vectors), float(term.sum()))


def taylor_sums(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    criterion: Criterion,
    input_ids: torch.Tensor,
    keep: HiddenStates | None,
) -> dict[str, Sums]:
    """Return the sums of the criterion's term over each tensor.

    Args:
        input_ids: shape (samples, seq_len), on the model's device.
    """
    sums = _TaylorSums(parameters, criterion, len(input_ids), keep)
    try:
        chain = find_chain(model, input_ids, parameters)
    except NotBlockwise as reason:
        _LOG.info("gradients of the whole model at once: %s", reason)
        chain = None
    run_backward(model, chain, input_ids, sums)
    return {name: sums.found[name] for name in parameters if name in sums.found}


class _TaylorSums(Collector):
    """The terms of ``Criterion``: sums over samples of the gradient g and of its square, times w.

    They are float32 or wider. A block's are reduced and forgotten once its last sample is through.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        criterion: Criterion,
        samples: int,
        keep: HiddenStates | None,
    ) -> None:
        super().__init__(
            parameters,
            together=criterion.order == "first",  # which adds up; a square is of one sample
            label="importance",
            keep=keep,
        )
        self._criterion, self._samples = criterion, samples
        self._first: dict[str, torch.Tensor] = {}
        self._second: dict[str, torch.Tensor] = {}
        self._batch_first: dict[str, torch.Tensor] = {}
        self._batch_second: dict[str, torch.Tensor] = {}
        self.found: dict[str, Sums] = {}

    def _so_far(self, sums: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        if name not in sums:
            weight = self.parameters[name].detach()
            wide = torch.promote_types(weight.dtype, torch.float32)
            sums[name] = torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format)
        return sums[name]

    def add_weight(self, name: str, part: slice, gradient: torch.Tensor, factor: float) -> None:  # noqa: ARG002
        """Add a gradient, and its square."""
        if self._criterion.order != "second":
            if name not in self._batch_first and factor == 1.0:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                self._batch_first[name] = gradient.to(
                    wide, memory_format=torch.contiguous_format, copy=True
                )
            else:
                self._so_far(self._batch_first, name).add_(gradient, alpha=factor)
        if self._criterion.order != "first":
            square = self._so_far(self._batch_second, name)
            exact = gradient.to(square.dtype)
            square.addcmul_(exact, exact, value=factor * factor)

    @torch.no_grad()
    def add_up(self, block: int | None, names: Iterable[str], batch: slice) -> None:  # noqa: ARG002
        """Add the sums of a batch to those before it."""
        both = ((self._batch_first, self._first), (self._batch_second, self._second))
        for found, before in {"first": both[:1], "second": both[1:]}.get(
            self._criterion.order, both
        ):
            for name in names:
                one = self._so_far(found, name)
                before[name] = before[name].add_(one) if name in before else one
        self._batch_first, self._batch_second = {}, {}

    @torch.no_grad()
    def finished(self, block: int | None, names: Iterable[str]) -> None:  # noqa: ARG002
        """Reduce the terms of these tensors."""
        for name in names:
            term = self._term(name, self.parameters[name].detach()).div_(self._samples)
            if self._criterion.reduction == "element":
                term.abs_()
            self.found[name] = reduced(term)
            self._first.pop(name, None)
            self._second.pop(name, None)

    def _term(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return g w, F w^2 / 2, or their difference, times the number of samples; in place."""
        if self._criterion.order == "first":
            return self._so_far(self._first, name).mul_(weight)
        square = self._so_far(self._second, name)
        if self._criterion.order == "second":
            return square.mul_(weight).mul_(weight).mul_(0.5)
        return square.mul_(weight).mul_(-0.5).add_(self._so_far(self._first, name)).mul_(weight)
