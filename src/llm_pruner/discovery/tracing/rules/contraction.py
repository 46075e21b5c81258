"""Matrix products and convolutions: the axes that are summed over shrink together."""

from __future__ import annotations

from typing import Any

import torch

from llm_pruner.discovery.tracing.atoms import product_rows
from llm_pruner.discovery.tracing.rules.pointwise import broadcast
from llm_pruner.discovery.tracing.tracer import Tracer, UnplacedError
from llm_pruner.types import IntArray


def _note_attention(tracer: Tracer, left: torch.Tensor, right: torch.Tensor) -> None:
    """Name the axes of a product of two activations: scores, or weights times values."""
    if tracer.is_weight(left) or tracer.is_weight(right):
        return
    batch, _, inner = tracer.label(left)
    outer = tracer.label(right)[2]
    tracer.note("head", batch)
    if tracer.atoms.resolve(inner).size:
        tracer.note("query_key", inner)
    elif tracer.atoms.resolve(outer).size:
        tracer.note("value", outer)


def _note_read(tracer: Tracer, left: torch.Tensor, right: torch.Tensor, rows: IntArray) -> None:
    """Remember that an axis is summed over, and whether by a weight."""
    tracer.note("read", rows)
    if tracer.is_weight(left) != tracer.is_weight(right):
        tracer.note("weighed", rows)


def mm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    left, right = tracer.label(args[0]), tracer.label(args[1])
    tracer.unify(left[1], right[0])
    _note_read(tracer, args[0], args[1], left[1])
    tracer.set_label(out, [left[0], right[1]])
    if args[0] in tracer.one_hot and tracer.trace.residual is None:
        tracer.trace.residual = right[1]


def bmm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    left, right = tracer.label(args[0]), tracer.label(args[1])
    batch = tracer.unify(left[0], right[0])
    tracer.unify(left[2], right[1])
    _note_read(tracer, args[0], args[1], left[2])
    tracer.set_label(out, [batch, left[1], right[2]])
    _note_attention(tracer, args[0], args[1])


def addmm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
    mm(tracer, func, args[1:3], kwargs, out)
    tracer.set_label(out, broadcast(tracer, [out, args[0]], 2))


def baddbmm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
    bmm(tracer, func, args[1:3], kwargs, out)
    tracer.set_label(out, broadcast(tracer, [out, args[0]], 3))


def mv(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    left, right = tracer.label(args[0]), tracer.label(args[1])
    tracer.unify(left[-1], right[0])
    _note_read(tracer, args[0], args[1], left[-1])
    tracer.set_label(out, left[:-1])


def dot(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
    """A number; one of nothing but weights divides them, as in a spectral norm."""
    if tracer.is_weight(args[0]) and tracer.is_weight(args[1]):
        raise UnplacedError("one number is made of the whole weight (a spectral norm)")
    mv(tracer, func, args, kwargs, out)


def grouped_mm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    """Rows sorted by expert times the weights of their expert: (t, k) x (experts, k, n).

    Where the rows of each expert end is given by running sums over counts. An expert that is never
    chosen has no rows, so that the others do not notice when it goes.
    """
    left, right = tracer.label(args[0]), tracer.label(args[1])
    if len(left) != 2 or len(right) != 3:
        raise UnplacedError("a grouped product of another form")
    ends = args[2] if len(args) > 2 else kwargs.get("offs")
    if isinstance(ends, torch.Tensor) and ends in tracer.counts:
        tracer.unify(right[0], tracer.label(ends)[0])
        tracer.note("routing", right[0])
    else:
        tracer.freeze(right[0], "experts run as one grouped product")
    tracer.unify(left[1], right[1])
    _note_read(tracer, args[0], args[1], left[1])
    tracer.set_label(out, [left[0], right[2]])
    for rows in (right[1], right[2]):
        tracer.note("aligned", rows)


def convolution(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    """Convolutions of any number of dimensions, transposed ones and ones in groups.

    The first axis of the weight is divided into groups: it holds the output channels, shape
    (out, in / groups, ...), of a transposed one the input channels, (in, out / groups, ...). Input
    and output channels are (group, channel of it): whole groups can go, or the same of each.
    """
    weight, bias, transposed, groups = args[1], args[2], args[6], args[8]
    axes, filters = tracer.label(args[0]), tracer.label(weight)
    for rows in (*axes[2:], *filters[2:]):
        tracer.freeze(rows, "a convolution runs along it")
    first, second = filters[:2]
    if groups == 1:
        source, channels = (first, second) if transposed else (second, first)
        tracer.unify(axes[1], source)
        _note_read(tracer, args[0], weight, axes[1])
    else:
        outer, _ = tracer.split(first, groups, len(first) // groups)
        joined = product_rows(outer, second)
        source, channels = (first, joined) if transposed else (joined, first)
        tracer.unify(axes[1], source)
        if weight.shape[0 if transposed else 1] != (groups if transposed else 1):
            _note_read(tracer, args[0], weight, axes[1])
    for rows in (source, channels):
        tracer.note("filter", rows)
    if bias is not None:
        channels = tracer.unify(channels, tracer.label(bias)[0])
    tail = [tracer.frozen_rows(size, "a convolution runs along it") for size in out.shape[2:]]
    tracer.set_label(out, [axes[0], channels, *tail])


RULES = {
    "mm": mm,
    "bmm": bmm,
    "addmm": addmm,
    "baddbmm": baddbmm,
    "mv": mv,
    **dict.fromkeys(("dot", "vdot"), dot),
    "_grouped_mm": grouped_mm,
    "convolution": convolution,
}
