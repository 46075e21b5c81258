"""Which sums of which tensors the chosen groups ask for, and those that need no gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from llm_pruner.errors import UserError
from llm_pruner.types import FloatArray, Group


@dataclass(frozen=True)
class Need:
    """Sums wanted of one tensor: one vector per entry of ``dims``, and the total if ``whole``."""

    dims: tuple[int, ...]
    whole: bool


@dataclass(frozen=True)
class Sums:
    """Sums of a term over one tensor.

    Attributes:
        by_dim: dim -> shape (size of dim,), the term summed over all other dims.
        total: sum over the whole tensor; 0 if it was not asked for.
    """

    by_dim: Mapping[int, FloatArray]
    total: float


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every name of every parameter, other names of tied ones included."""
    return dict(model.named_parameters(remove_duplicate=False))


def layer_parameters(model: nn.Module, module: str) -> list[str]:
    """Return the first names of the parameters of one module."""
    inside = {id(parameter) for parameter in model.get_submodule(module).parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]


def collect_needs(model: nn.Module, groups: Iterable[Group]) -> dict[str, Need]:
    """Return tensor name -> sums wanted, for all importance-carrying members of ``groups``.

    Raises:
        UserError: a member names a tensor that the model does not have.
    """
    known = parameters_by_name(model)
    dims: dict[str, set[int]] = {}
    whole: set[str] = set()
    for group in groups:
        for member in group.members:
            if member.buffer:
                continue
            if member.tensor not in known:
                raise UserError(
                    f"group {group.name} names the tensor {member.tensor}, which the model does "
                    "not have; discover the groups of this very model"
                )
            dims.setdefault(member.tensor, set()).add(member.dim)
        for module in group.modules:
            whole.update(layer_parameters(model, module))
    names = dict.fromkeys([*dims, *sorted(whole)])
    return {name: Need(tuple(sorted(dims.get(name, ()))), name in whole) for name in names}


def reduce_term(term: torch.Tensor, need: Need) -> Sums:
    """Return the sums of ``term`` that ``need`` asks for, in float64."""
    by_dim: dict[int, FloatArray] = {}
    for dim in need.dims:
        others = [axis for axis in range(term.ndim) if axis != dim]
        vector = term.sum(others) if others else term
        by_dim[dim] = vector.double().cpu().numpy().copy()
    return Sums(by_dim, float(term.sum()) if need.whole else 0.0)


def magnitude_sums(model: nn.Module, needs: Mapping[str, Need], name: str) -> dict[str, Sums]:
    """Return the sums of |w| (``l1``) or w^2 (``l2``; the root follows per unit)."""
    parameters = parameters_by_name(model)
    sums: dict[str, Sums] = {}
    with torch.no_grad():
        for tensor, need in needs.items():
            weight = parameters[tensor].detach()
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            sums[tensor] = reduce_term(weight.abs() if name == "l1" else weight.square(), need)
    return sums
