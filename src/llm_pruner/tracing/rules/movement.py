"""Views, permutations, cuts and joins: axes move, split and merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

from torch import Tensor

from llm_pruner.tracing.atoms import empty_rows, product_rows, stack_rows
from llm_pruner.tracing.functions import require_sight
from llm_pruner.tracing.ops import Call, UnplacedError, rule
from llm_pruner.tracing.trace import Axes
from llm_pruner.tracing.tracer import Tracer


def view_axes(tracer: Tracer, axes: Axes, shape: tuple[int, ...]) -> Axes:
    """Return the axes of a view in row-major order.

    Old and new sizes are cut into the smallest blocks of equal product. Inside a block the old axes
    are merged and split again.
    """
    result: Axes = [empty_rows(1) for _ in shape]
    old = [(len(rows), rows) for rows in axes if len(rows) != 1]
    new = [(size, place) for place, size in enumerate(shape) if size != 1]
    i = j = 0
    while i < len(old) or j < len(new):
        taken, placed = [old[i]], [new[j]]
        have, want = old[i][0], new[j][0]
        i, j = i + 1, j + 1
        while have != want:
            if have < want:
                taken.append(old[i])
                have *= old[i][0]
                i += 1
            else:
                placed.append(new[j])
                want *= new[j][0]
                j += 1
        rows = taken[0][1]
        for _, inner in taken[1:]:
            rows = tracer.merge(rows, inner)
        for size, place in placed[:-1]:
            result[place], rows = tracer.split(rows, size, len(rows) // size)
        result[placed[-1][1]] = rows
    return result


_MOVED: dict[str, Any] = {"moves": True, "domain": "kept"}


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", **_MOVED)
def view(tracer: Tracer, call: Call, self: Tensor) -> None:
    out = call.out
    if self.numel() == 0:
        # No tokens: the other axes follow if as many axes are empty before and after.
        axes, shape = tracer.label(self), tuple(out.shape)
        kept = [rows for rows in axes if len(rows)]
        if shape.count(0) != len(axes) - len(kept) or math.prod(map(len, kept)) != math.prod(
            filter(None, shape)
        ):
            raise UnplacedError("a view of an empty tensor")
        placed = iter(view_axes(tracer, kept, tuple(filter(None, shape))))
        tracer.set_label(out, [next(placed) if size else empty_rows(0) for size in shape])
    elif self.dtype != out.dtype and self.shape == out.shape:
        same(tracer, call, self)
    else:
        if _plain_sizes(self) != _plain_sizes(out):
            require_sight(tracer)
        tracer.set_label(out, view_axes(tracer, tracer.label(self), tuple(out.shape)))


def _plain_sizes(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


@rule("clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh", **_MOVED)
@rule("lift_fresh_copy", "detach_", "view_as", "positive", "resolve_conj", **_MOVED)
def same(tracer: Tracer, call: Call, self: Tensor) -> None:
    tracer.set_label(call.out, tracer.label(self))
    if self in tracer.counts:
        tracer.counts[call.out] = True


@rule("t", **_MOVED)
def turn(tracer: Tracer, call: Call, self: Tensor) -> None:
    tracer.set_label(call.out, tracer.label(self)[::-1])


@rule("permute", **_MOVED)
def permute(tracer: Tracer, call: Call, self: Tensor, dims: Sequence[int]) -> None:
    axes = tracer.label(self)
    tracer.set_label(call.out, [axes[dim] for dim in dims])


@rule("transpose", **_MOVED)
def transpose(tracer: Tracer, call: Call, self: Tensor, dim0: int, dim1: int) -> None:
    axes = tracer.label(self)
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    tracer.set_label(call.out, axes)


@rule("squeeze", "unsqueeze", "squeeze_", "unsqueeze_", **_MOVED)
def squeeze(tracer: Tracer, call: Call, self: Tensor) -> None:
    kept = [rows for rows in tracer.label(self) if len(rows) != 1]
    tracer.set_label(call.out, view_axes(tracer, kept, tuple(call.out.shape)))


def _in_front(tracer: Tracer, tensor: Tensor, dims: int) -> Axes:
    """Return the axes of a tensor with new ones of one position in front, ``dims`` in all."""
    axes = tracer.label(tensor)
    return [empty_rows(1)] * (dims - len(axes)) + axes


@rule("expand", **_MOVED)
def expand(tracer: Tracer, call: Call, self: Tensor) -> None:
    """New positions are replicas: they all hold the same values."""
    axes, sizes = _in_front(tracer, self, call.out.dim()), list(call.out.shape)
    if [len(rows) for rows in axes] != sizes:
        require_sight(tracer)
    tracer.set_label(
        call.out,
        [
            rows if len(rows) == size else tracer.atoms.fresh(size, replica=True)
            for rows, size in zip(axes, sizes, strict=True)
        ],
    )


@rule("repeat")
def repeat(tracer: Tracer, call: Call, self: Tensor) -> None:
    require_sight(tracer)
    axes = _in_front(tracer, self, call.out.dim())
    result = []
    for rows, size in zip(axes, call.out.shape, strict=True):
        if len(rows) == size:
            result.append(rows)
        elif len(rows) == 1:
            result.append(tracer.atoms.fresh(size, replica=True))
        else:
            # Tokens once for each expert: copies may go with what they meet.
            if tracer.atoms.resolve(rows).size:
                times = tracer.frozen_rows(size // len(rows), "repeated a fixed number of times")
            else:
                times = tracer.atoms.fresh(size // len(rows), replica=True)
            result.append(product_rows(times, rows))
    tracer.set_label(call.out, result)


@rule("slice", **_MOVED)
def slice_(
    tracer: Tracer,
    call: Call,
    self: Tensor,
    dim: int,
    start: int | None,
    end: int | None,
    step: int,
) -> None:
    axes = tracer.label(self)
    if self.shape != call.out.shape:
        require_sight(tracer)
        tracer.cut_from[call.out] = axes[dim]
    axes[dim] = axes[dim][start:end:step]
    tracer.set_label(call.out, axes)


@rule("select", **_MOVED)
@rule("unbind", moves=True)
def select(tracer: Tracer, call: Call, self: Tensor, dim: int) -> None:
    axes = tracer.label(self)
    tracer.freeze(axes.pop(dim), "single positions of it are taken")
    for piece in call.results:
        tracer.set_label(piece, axes)


@rule("split", "split_with_sizes", moves=True)
@rule("chunk", "unsafe_split")
def split(tracer: Tracer, call: Call, self: Tensor, dim: int) -> None:
    require_sight(tracer)
    axes = tracer.label(self)
    whole, start = axes[dim], 0
    for piece in call.results:
        stop = start + piece.shape[dim]
        axes[dim] = whole[start:stop]
        tracer.set_label(piece, axes)
        tracer.cut_from[piece] = whole
        start = stop


@rule("cat", moves=True, domain="tied")
def cat(tracer: Tracer, call: Call, tensors: Sequence[Tensor], dim: int) -> None:
    # An empty tensor of one axis may be joined with any other.
    labels = [tracer.label(part) for part in tensors if part.dim() == call.out.dim()]
    dim = dim % call.out.dim()
    axes: Axes = []
    for place, rows in enumerate(zip(*labels, strict=True)):
        if place == dim:
            axes.append(stack_rows(list(rows)))
            continue
        axes.append(reduce(tracer.unify, rows))
    tracer.set_label(call.out, axes)
    # Positions of one axis joined are positions still.
    domains = [tracer.domains[part] for part in tensors if part in tracer.domains]
    if len(domains) == len(tensors) and len({*map(len, domains)}) == 1:
        tracer.domains[call.out] = reduce(tracer.unify, domains)
    else:
        for rows in domains:
            tracer.freeze(rows, "its positions are chosen by cat")


@rule("stack")
def stack(tracer: Tracer, call: Call, tensors: Sequence[Tensor], dim: int) -> None:
    axes, *others = [tracer.label(part) for part in tensors]
    for label in others:
        axes = [tracer.unify(a, b) for a, b in zip(axes, label, strict=True)]
    dim = dim % call.out.dim()
    axes.insert(dim, tracer.frozen_rows(call.out.shape[dim], "stacked in the code"))
    tracer.set_label(call.out, axes)


@rule("constant_pad_nd", *(f"reflection_pad{n}d" for n in (1, 2, 3)))
@rule(*(f"replication_pad{n}d" for n in (1, 2, 3)))
def pad(
    tracer: Tracer, call: Call, self: Tensor, pad: Sequence[int] = (), padding: Sequence[int] = ()
) -> None:
    """``pad`` counts the positions added before and behind, last axis first; negative ones crop."""
    axes = tracer.label(self)
    for number, count in enumerate([*pad, *padding]):
        if count:
            place = self.dim() - 1 - number // 2
            tracer.freeze(axes[place], "padded in the code")
            axes[place] = tracer.frozen_rows(call.out.shape[place], "padded in the code")
    tracer.set_label(call.out, axes)


@rule("roll", "flip")
def reorder(tracer: Tracer, call: Call, self: Tensor, dims: Sequence[int]) -> None:
    axes = tracer.label(self)
    for dim in dims or range(len(axes)):
        tracer.freeze(axes[dim], f"reordered by {call.name}")
    tracer.set_label(call.out, axes)


@rule("tril", "triu", "tril_", "triu_")
def triangle(tracer: Tracer, call: Call, self: Tensor) -> None:
    axes = tracer.label(self)
    for rows in axes[-2:]:
        tracer.freeze(rows, "a triangular mask covers it")
    tracer.set_label(call.out, axes)


@rule("unfold")
def unfold(tracer: Tracer, call: Call, self: Tensor, dimension: int) -> None:
    axes = tracer.label(self)
    tracer.freeze(axes[dimension], "cut into overlapping windows")
    axes[dimension] = tracer.frozen_rows(call.out.shape[dimension], "windows")
    axes.append(tracer.frozen_rows(call.out.shape[-1], "windows"))
    tracer.set_label(call.out, axes)


@rule("view_as_complex")
def as_complex(tracer: Tracer, call: Call, self: Tensor) -> None:
    """Pairs of neighbours become complex numbers; an axis that they were cut from stays even."""
    if self in tracer.cut_from:
        tracer.note("even", tracer.cut_from[self])
    axes = tracer.label(self)
    tracer.freeze(axes[-1], "pairs are read as complex numbers")
    tracer.set_label(call.out, axes[:-1])


@rule("view_as_real")
def as_real(tracer: Tracer, call: Call, self: Tensor) -> None:
    pair = tracer.frozen_rows(2, "pairs are read as complex numbers")
    tracer.set_label(call.out, [*tracer.label(self), pair])
