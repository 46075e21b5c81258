"""Indexing: positions taken by value.

An index that holds positions of a live axis (from ``topk``) lets both axes shrink together, as what
is deleted is never chosen. Any other index freezes the axis that it reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_pruner.tracing.ops import Call, UnplacedError, rule
from llm_pruner.tracing.rules.pointwise import broadcast, pointwise
from llm_pruner.tracing.trace import Axes
from llm_pruner.tracing.tracer import Tracer
from llm_pruner.types import IntArray

Indices = Sequence[Tensor | None]


def _tie_indexed(tracer: Tracer, rows: IntArray, index: Tensor, what: str) -> None:
    """State what an index does to the axis that it reads or writes."""
    tracer.look_up(rows, index)
    domain = tracer.domains.get(index)
    if domain is not None and len(domain) == len(rows):
        tracer.unify(domain, rows)
        return
    if domain is not None:
        tracer.freeze(domain, what)
    tracer.freeze(rows, "the vocabulary" if index in tracer.vocabulary else what)


def _indexed(tracer: Tracer, self: Tensor, dim: int, index: Tensor, what: str) -> tuple[Axes, int]:
    """Tie an axis to the index along it; return all axes, and which it is, from the left."""
    axes = tracer.label(self)
    dim = dim % max(len(axes), 1)
    _tie_indexed(tracer, axes[dim], index, what)
    return axes, dim


def _note_tokens(tracer: Tracer, index: Tensor, tail: Axes) -> None:
    """The first table that token ids index gives the hidden state."""
    if index in tracer.vocabulary and tracer.trace.residual is None and tail:
        tracer.trace.residual = tail[-1]


def _selects(item: Tensor) -> bool:
    """Whether an index is a mask."""
    return item.dtype in (torch.bool, torch.uint8)


@rule("embedding", domain="tied", product=True)
def embedding(tracer: Tracer, call: Call, weight: Tensor, indices: Tensor) -> None:
    rows, *tail = tracer.label(weight)
    _tie_indexed(tracer, rows, indices, "looked up by position")
    tracer.set_label(call.out, tracer.label(indices) + tail)
    _note_tokens(tracer, indices, tail)


@rule("index", domain="kept", moves=True)
def index(tracer: Tracer, call: Call, self: Tensor, indices: Indices) -> None:
    """Advanced indexing: the indexed axes are replaced by those of the index tensors."""
    axes = tracer.label(self)
    given = {place: item for place, item in enumerate(indices) if item is not None}
    places, items = list(given), list(given.values())
    for place, item in given.items():
        for rows in axes[place : place + (item.dim() if _selects(item) else 1)]:
            _tie_indexed(tracer, rows, item, "looked up by position")
        if tracer.is_weight(self) and item in tracer.domains:
            tracer.note("routing", axes[place])
    if any(map(_selects, items)):
        for item in items:
            tracer.freeze_axes(item, "selected by a mask")
        dims = sum(item.dim() for item in items)
        if dims == len(places) == 1:
            axes[places[0]] = tracer.frozen_rows(call.out.shape[places[0]], "selected by a mask")
            tracer.set_label(call.out, axes)
            return
        if places != [0] or len(axes) - dims + 1 != call.out.dim():
            raise UnplacedError("selected by a mask")
        chosen = tracer.frozen_rows(call.out.shape[0], "selected by a mask")
        tracer.set_label(call.out, [chosen, *axes[dims:]])
        return
    joined = broadcast(tracer, items, max(item.dim() for item in items))
    rest = [rows for place, rows in enumerate(axes) if place not in given]
    adjacent = places == list(range(places[0], places[0] + len(places)))
    front = places[0] if adjacent else 0
    tracer.set_label(call.out, rest[:front] + joined + rest[front:])
    if places == [0] and tracer.is_weight(self):
        _note_tokens(tracer, items[0], rest)


@rule("index_select", domain="kept")
def index_select(tracer: Tracer, call: Call, self: Tensor, dim: int, index: Tensor) -> None:
    axes, dim = _indexed(tracer, self, dim, index, "looked up by position")
    axes[dim] = tracer.label(index)[0] if index.dim() else axes[dim][:1]
    tracer.set_label(call.out, axes)
    if dim == 0 and tracer.is_weight(self):
        _note_tokens(tracer, index, axes[1:])


def _align(tracer: Tracer, axes: Axes, others: Axes, skip: int) -> None:
    for place, (rows, other) in enumerate(zip(axes, others, strict=True)):
        if place == skip:
            continue
        if len(rows) == len(other):
            tracer.unify(rows, other)
        else:
            tracer.freeze(rows, "read in part")
            tracer.freeze(other, "read in part")


@rule("gather", domain="kept")
def gather(tracer: Tracer, call: Call, self: Tensor, dim: int, index: Tensor) -> None:
    chosen = tracer.label(index)
    axes, dim = _indexed(tracer, self, dim, index, "looked up by position")
    _align(tracer, axes, chosen, dim)
    tracer.set_label(call.out, chosen)
    if dim == 0 and tracer.is_weight(self):
        _note_tokens(tracer, index, axes[1:])


@rule("scatter", "scatter_", domain="tied")
@rule("scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
def scatter(
    tracer: Tracer, call: Call, self: Tensor, dim: int, index: Tensor, src: Tensor | None = None
) -> None:
    axes, dim = _indexed(tracer, self, dim, index, "written by position")
    chosen = tracer.label(index)
    _align(tracer, axes, chosen, dim)
    if src is not None and src.dim() == len(axes):
        values = tracer.label(src)
        _align(tracer, axes, values, dim)
        if len(values[dim]) == len(chosen[dim]):
            tracer.unify(values[dim], chosen[dim])
        else:
            tracer.freeze(values[dim], "read in part")
    for positions in (self, src):
        if positions is not None and positions in tracer.domains:
            tracer.freeze(tracer.domains[positions], "its positions are written")
    tracer.set_label(call.out, axes)


@rule("index_add", "index_add_", "index_copy", "index_copy_")
def index_add(
    tracer: Tracer, call: Call, self: Tensor, dim: int, index: Tensor, source: Tensor
) -> None:
    axes, dim = _indexed(tracer, self, dim, index, "written by position")
    if source.dim() == len(axes):
        values = tracer.label(source)
        tracer.freeze(values[dim], "written by position")
        _align(tracer, axes, values, dim)
    tracer.set_label(call.out, axes)


@rule("index_put", "index_put_", "_index_put_impl_")
def index_put(tracer: Tracer, call: Call, self: Tensor, indices: Indices, values: Tensor) -> None:
    """Writing by position freezes the indexed axes, unless a mask of ``self``'s shape fills it."""
    mask = indices[0]
    of_all = mask is not None and mask.dtype == torch.bool and mask.shape == self.shape
    if of_all and values.numel() == 1:
        pointwise(tracer, call)
        return
    axes = tracer.label(self)
    rest: Axes = []
    place = 0
    for item in indices:
        if item is None:
            rest.append(axes[place])
            place += 1
            continue
        width = item.dim() if _selects(item) else 1
        if _selects(item):
            tracer.freeze_axes(item, "written by position")
        for rows in axes[place : place + width]:
            _tie_indexed(tracer, rows, item, "written by position")
        place += width
    rest += axes[place:]
    written = tracer.label(values)
    for back, rows in enumerate(reversed(rest), start=1):
        if back <= len(written) and len(written[-back]) == len(rows):
            tracer.unify(rows, written[-back])
        elif back <= len(written) and len(written[-back]) != 1:
            raise UnplacedError("written by position")
    for rows in written[: max(len(written) - len(rest), 0)]:
        tracer.freeze(rows, "written by position")
    tracer.set_label(call.out, axes)


@rule("nonzero", "_local_scalar_dense", "equal", "is_nonzero")
@rule("searchsorted", "bucketize", "unique_consecutive", "_unique2", "bincount")
def found(tracer: Tracer, call: Call) -> None:
    """``nonzero``, ``.item()``: what the code does next depends on the values."""
    for tensor in call.inputs:
        tracer.freeze_axes(tensor, f"the code follows its values ({call.name})")
    for result in call.results:
        tracer.set_label(result, tracer.frozen_axes(result, "found by value"))


@rule("histc", domain="tied")
def histc(tracer: Tracer, call: Call, self: Tensor, bins: int, min: float, max: float) -> None:
    """Count how often each position was chosen, if every position has a bin of its own."""
    domain = tracer.domains.get(self)
    if domain is not None and (bins, min, max) == (len(domain), 0, len(domain) - 1):
        tracer.set_label(call.out, [domain])
        tracer.counts[call.out] = True
        return
    if domain is not None:
        tracer.freeze(domain, "counted in other bins than its positions")
    found(tracer, call)
