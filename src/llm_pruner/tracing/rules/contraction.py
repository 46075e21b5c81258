"""Matrix products and convolutions: the axes that are summed over shrink together."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from torch import Tensor

from llm_pruner.tracing.atoms import empty_rows, product_rows
from llm_pruner.tracing.ops import OPS, Alive, Call, Op, Run, UnplacedError, rule
from llm_pruner.tracing.rules.pointwise import broadcast
from llm_pruner.tracing.trace import Axes
from llm_pruner.tracing.tracer import Tracer
from llm_pruner.types import IntArray


def _note_attention(tracer: Tracer, left: Tensor, right: Tensor) -> None:
    """Note the roles of axes in a product of two activations: scores, or weights times values."""
    if tracer.is_weight(left) or tracer.is_weight(right):
        return
    batch, _, inner = tracer.label(left)
    outer = tracer.label(right)[2]
    tracer.note("head", batch)
    if tracer.atoms.resolve(inner).size:
        tracer.note("query_key", inner)
    elif tracer.atoms.resolve(outer).size:
        tracer.note("value", outer)


def _note_read(
    tracer: Tracer, left: Tensor, right: Tensor, rows: IntArray, others: IntArray
) -> None:
    """Note that an axis, ``rows`` in ``left`` and ``others`` in ``right``, is summed over."""
    tracer.note("read", rows)
    if tracer.is_weight(left) != tracer.is_weight(right):
        tracer.note("weighed", rows if tracer.is_weight(left) else others)


def _multiply(tracer: Tracer, call: Call, left: Tensor, right: Tensor) -> None:
    """Sum over the last axis of one factor and the first of the other."""
    rows, columns = tracer.label(left), tracer.label(right)
    tracer.unify(rows[-1], columns[0])
    _note_read(tracer, left, right, rows[-1], columns[0])
    tracer.set_label(call.out, rows[:-1] + columns[1:])


def _living_product(
    alive: Alive,
    run: Run,
    self: Tensor,
    mat1: Tensor | None = None,
    mat2: Tensor | None = None,
    batch1: Tensor | None = None,
    batch2: Tensor | None = None,
) -> Any:
    """Multiply the living positions only: the others of one factor may not be zeros."""
    if batch1 is not None and batch2 is not None:
        names, left, right = ("batch1", "batch2"), batch1, batch2
    else:
        assert mat2 is not None
        names = ("self" if mat1 is None else "mat1", "mat2")
        left, right = self if mat1 is None else mat1, mat2
    living = alive(left, left.dim() - 1)
    if living is None:
        return run()
    cut = left.index_select(-1, living), right.index_select(-2, living)
    return run(**dict(zip(names, cut, strict=True)))


@rule("mm", product=True, makes_weights=True, alive=_living_product)
def mm(tracer: Tracer, call: Call, self: Tensor, mat2: Tensor) -> None:
    _multiply(tracer, call, self, mat2)


@rule("bmm", product=True, alive=_living_product)
def bmm(tracer: Tracer, call: Call, self: Tensor, mat2: Tensor) -> None:
    left, right = tracer.label(self), tracer.label(mat2)
    batch = tracer.unify(left[0], right[0])
    tracer.unify(left[2], right[1])
    _note_read(tracer, self, mat2, left[2], right[1])
    tracer.set_label(call.out, [batch, left[1], right[2]])
    _note_attention(tracer, self, mat2)


@rule("addmm", product=True, alive=_living_product)
def addmm(tracer: Tracer, call: Call, self: Tensor, mat1: Tensor, mat2: Tensor) -> None:
    mm(tracer, call, mat1, mat2)
    tracer.set_label(call.out, broadcast(tracer, [call.out, self], 2))


@rule("baddbmm", product=True, alive=_living_product)
def baddbmm(tracer: Tracer, call: Call, self: Tensor, batch1: Tensor, batch2: Tensor) -> None:
    bmm(tracer, call, batch1, batch2)
    tracer.set_label(call.out, broadcast(tracer, [call.out, self], 3))


@rule("mv", product=True, makes_weights=True)
def mv(tracer: Tracer, call: Call, self: Tensor, vec: Tensor) -> None:
    _multiply(tracer, call, self, vec)


@rule("_grouped_mm", product=True)
def grouped_mm(tracer: Tracer, call: Call, self: Tensor, mat2: Tensor, offs: Tensor | None) -> None:
    """Rows sorted by expert times the weights of their expert: (t, k) x (experts, k, n).

    ``offs`` are running sums of counts: where the rows of each expert end. An expert that is never
    chosen has no rows, so it can go without a trace.
    """
    left, right = tracer.label(self), tracer.label(mat2)
    if len(left) != 2 or len(right) != 3:
        raise UnplacedError("a grouped product of another form")
    if offs is not None and offs in tracer.counts:
        tracer.unify(right[0], tracer.label(offs)[0])
        tracer.note("routing", right[0])
    else:
        tracer.freeze(right[0], "experts run as one grouped product")
    tracer.unify(left[1], right[1])
    _note_read(tracer, self, mat2, left[1], right[1])
    tracer.set_label(call.out, [left[0], right[2]])
    for rows in (right[1], right[2]):
        tracer.note("aligned", rows)


@rule("linalg_solve_triangular", product=True)
def solve_triangular(tracer: Tracer, call: Call, self: Tensor, B: Tensor, left: bool) -> None:
    """X of self X = B or X self = B: the axis of the system stays, columns are independent."""
    systems, axes = tracer.label(self), tracer.label(B)
    for rows in (*systems[-2:], axes[-2 if left else -1]):
        tracer.freeze(rows, "a system of equations is solved along it")
    met: Axes = []
    pairs = zip_longest(systems[-3::-1], axes[-3::-1], fillvalue=empty_rows(1))
    for one, other in pairs:
        alike = len(one) == len(other)
        met.insert(0, tracer.unify(one, other) if alike else max(one, other, key=len))
    tracer.set_label(call.out, met + axes[-2:])


@rule("convolution", product=True)
def convolution(
    tracer: Tracer,
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    groups: int,
) -> None:
    """Convolutions of any number of dimensions, transposed ones and ones in groups.

    Weights are (out, in / groups, ...), or (in, out / groups, ...) if transposed. Channels are
    (group, channel in it): whole groups can go, or the same channel of each.
    """
    axes, filters = tracer.label(input), tracer.label(weight)
    for rows in (*axes[2:], *filters[2:]):
        tracer.freeze(rows, "a convolution runs along it")
    first, second = filters[:2]
    if groups == 1:
        source, channels = (first, second) if transposed else (second, first)
        tracer.unify(axes[1], source)
        _note_read(tracer, input, weight, axes[1], source)
    else:
        outer, _ = tracer.split(first, groups, len(first) // groups)
        joined = product_rows(outer, second)
        source, channels = (first, joined) if transposed else (joined, first)
        tracer.unify(axes[1], source)
        if weight.shape[0 if transposed else 1] != (groups if transposed else 1):
            _note_read(tracer, input, weight, axes[1], source)
    for rows in (source, channels):
        tracer.note("filter", rows)
    if bias is not None:
        channels = tracer.unify(channels, tracer.label(bias)[0])
    sizes = call.out.shape[2:]
    tail = [tracer.frozen_rows(size, "a convolution runs along it") for size in sizes]
    tracer.set_label(call.out, [axes[0], channels, *tail])


# Products without a rule; ghosts need not compute them.
OPS |= dict.fromkeys(
    ("addmv", "dot", "vdot", "linear", "matmul", "grouped_mm_fallback"), Op(product=True)
)
