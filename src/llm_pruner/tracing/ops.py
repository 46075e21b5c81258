"""The table of ATen operations: one row holds everything that is known about one.

``rule`` adds a row. The rows are in ``rules``, by family; ``docs/how-to/add-rule.md`` shows how to
write one. Argument names and defaults, whether an operation is a view, writes in place or works
elementwise are read from PyTorch's schema and tags.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

Rule: TypeAlias = Callable[..., None]
"""rule(tracer, call, arguments of the operation by the names in its schema)"""

Alive: TypeAlias = Callable[[torch.Tensor, int], torch.Tensor | None]
"""Returns the positions along an axis of a tensor that are not removed, or None if all stay."""

Run: TypeAlias = Callable[..., Any]
"""Runs an operation with some of its arguments, given by their names, replaced."""


class UnplacedError(Exception):
    """A rule cannot label its result; the inputs are frozen with this reason."""


class Call(NamedTuple):
    """One call of an operation.

    Attributes:
        name: of the operation, without overload: ``add``, ``add_``.
        inputs: all tensors among its arguments, those in lists too.
        out: what it returned.
    """

    name: str
    inputs: list[torch.Tensor]
    out: Any

    @property
    def results(self) -> list[torch.Tensor]:
        """All tensors that it returned."""
        return tensors_in([self.out])


@dataclass(frozen=True)
class Op:
    """What is known about an operation.

    Attributes:
        rule: labels the axes of the results; without one all inputs are frozen.
        moves: it only moves values, so weights stay weights and token ids stay token ids.
        makes_weights: its result is a weight if all inputs are, as a low-rank update.
        keeps_ids: integers computed from token ids are token ids.
        domain: what happens to an axis whose positions an input holds (from ``topk``). ``read``:
            frozen, as the positions are calculated with; ``kept``: the results hold them as well;
            ``tied``: the rule decides.
        product: ghosts are not multiplied, the result is only shaped.
        alive: alive(living positions, run, arguments by name) runs it in the masked twin where
            removed positions, which are zero, would change the result.
    """

    rule: Rule | None = None
    moves: bool = False
    makes_weights: bool = False
    keeps_ids: bool = False
    domain: Literal["read", "kept", "tied"] = "read"
    product: bool = False
    alive: Callable[..., Any] | None = None


OPS: dict[str, Op] = {}
"""Name of an operation, without overload -> its row. ``pointwise`` stands for all operations that
PyTorch tags as pointwise and that have no row of their own."""


def rule(*names: str, **columns: Any) -> Callable[[Rule], Rule]:
    """Add a row for these operations: the decorated rule, and ``columns`` of ``Op``."""

    def add(function: Rule) -> Rule:
        OPS.update(dict.fromkeys(names, Op(function, **columns)))
        operation.cache_clear()
        return function

    return add


@dataclass(frozen=True)
class Operation:
    """One overload of an operation.

    Attributes:
        func: runs it.
        name: without overload.
        op: its row; an empty one if there is none.
        mutates: it writes to an input.
        reshapes: it gives an input other axes.
        view: its results share the memory of an input, and with it the strides.
        names: of its arguments, in order.
        defaults: argument -> default, of those that have one.
    """

    func: Any
    name: str
    op: Op
    mutates: bool
    reshapes: bool
    view: bool
    names: tuple[str, ...]
    defaults: Mapping[str, Any]

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name, defaults among them."""
        return {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}

    def asked(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of a call that a function has parameters for."""
        names = parameters(function)
        given = self.given(args, kwargs) if names else {}
        return {name: given[name] for name in names if name in given}


@functools.cache
def operation(func: Any) -> Operation:
    """Return what is known about an overload, such as ``torch.ops.aten.sum.dim_IntList``."""
    name, schema = func._overloadpacket.__name__, func._schema
    tagged = OPS.get("pointwise", Op()) if torch.Tag.pointwise in func.tags else Op()
    return Operation(
        func=func,
        name=name,
        op=OPS.get(name, tagged),
        mutates=schema.is_mutable,
        reshapes=torch.Tag.inplace_view in func.tags,
        view=any(one.alias_info and not one.alias_info.is_write for one in schema.returns),
        names=tuple(one.name for one in schema.arguments),
        defaults={
            one.name: one.default_value for one in schema.arguments if one.has_default_value()
        },
    )


@functools.cache
def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's parameters but for the first two."""
    return tuple(inspect.signature(function).parameters)[2:]


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Return the tensors in nested lists and tuples."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(tensors_in(value))
    return found
