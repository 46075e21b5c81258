"""Linear modules that read a group's axis, such as ``down_proj``, and Gram matrices of inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm_pruner.models.streaming import values_of
from llm_pruner.types import Group, IntArray


@dataclass(frozen=True)
class Consumer:
    """A linear module whose input features belong to a group.

    Attributes:
        group: name of the group.
        module: qualified name of the module.
        index: shape (units, k); row u holds the input features that unit u owns.
    """

    group: str
    module: str
    index: IntArray


def linear_modules(model: nn.Module) -> dict[int, list[str]]:
    """Return id of a weight -> the linear modules (``nn.Linear`` or ``Conv1D``) that have it."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if input_dim(module) is not None:
            found.setdefault(id(module.weight), []).append(name)
    return found


def consumers_of(
    model: nn.Module, group: Group, linear: Mapping[int, Sequence[str]] | None = None
) -> tuple[Consumer, ...]:
    """Return the modules of ``linear_modules`` that read the group's axis, by tied weights too."""
    linear = linear_modules(model) if linear is None else linear
    return tuple(
        Consumer(group.name, name, member.index)
        for member in group.members
        if not member.buffer and member.tensor.rpartition(".")[2] == "weight"
        for name in linear.get(id(model.get_parameter(member.tensor)), ())
        if input_dim(model.get_submodule(name)) == member.dim
    )


def input_dim(module: nn.Module) -> int | None:
    """Return the axis of ``weight`` that meets the input; None if the module is not linear."""
    if isinstance(module, nn.Linear):
        return 1
    return 0 if isinstance(module, Conv1D) else None


def weight_of(module: nn.Module) -> torch.Tensor:
    """Return a linear module's weight as a view of shape (out_features, in_features)."""
    weight = values_of(module.get_parameter("weight"))
    return weight if input_dim(module) == 1 else weight.T


def set_weight(module: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """Give a linear module a weight (out_features, in_features), of ``dtype`` or what is longer.

    The old parameter is left as it is: a copy of the model may share it.
    """
    old = module.get_parameter("weight")
    new = weight if input_dim(module) == 1 else weight.T
    module.weight = nn.Parameter(
        new.to(old.device, torch.promote_types(old.dtype, dtype)).contiguous(),
        requires_grad=old.requires_grad,
    )


_STRIPS = 8
_NARROW, _WIDE = 256, 512
"""Features of a strip below which more calls would cost more than they save, and beyond which they
save more than they cost."""


def add_gram_(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Add x^T x to ``gram``, (features, features), on and above the diagonal.

    ``rows`` is x, (tokens, features). `complete_gram_` fills the other half.
    """
    for start, stop in _strips(len(gram)):
        add_product_(gram[start:stop, start:], rows[:, start:stop].T, rows[:, start:])


def add_product_(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right`` to ``sums``; of factors of a shorter dtype, it is rounded to that."""
    if left.dtype == sums.dtype:
        sums.addmm_(left, right)
    else:
        sums.add_(left @ right)


def complete_gram_(gram: torch.Tensor) -> torch.Tensor:
    """Return ``gram`` with what is left of its diagonal as it is to the right."""
    for start, stop in _strips(len(gram)):
        square = gram[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)  # a product need not be symmetric
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def _strips(features: int) -> list[tuple[int, int]]:
    width = max(_NARROW, min(_WIDE, -(-features // _STRIPS)))
    return [(start, min(start + width, features)) for start in range(0, features, width)]
