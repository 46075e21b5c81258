"""Lookups: positions taken by value.

An index whose values are known to be positions of a live axis (from ``topk``) lets both shrink
together: what is deleted is never chosen. Any other index freezes the axis that it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm_pruner.discovery.tracing.ops import Call, UnplacedError, rule
from llm_pruner.discovery.tracing.rules.pointwise import broadcast
from llm_pruner.discovery.tracing.trace import Axes
from llm_pruner.discovery.tracing.tracer import Tracer
from llm_pruner.types import IntArray

Indices = Sequence[Tensor | None]


def _tie_indexed(tracer: Tracer, rows: IntArray, index: Tensor, what: str) -> None:
    """State what an index does to the axis that it reads or writes."""
    domain = tracer.domains.get(index)
    if domain is not None and len(domain) == len(rows):
        tracer.unify(domain, rows)
        return
    if domain is not None:
        tracer.freeze(domain, what)
    tracer.freeze(rows, "the vocabulary" if index in tracer.vocabulary else what)


def _note_tokens(tracer: Tracer, index: Tensor, tail: Axes) -> None:
    """The first table that tokens index is where the hidden state begins."""
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
        _tie_indexed(tracer, axes[place], item, "looked up by position")
        if tracer.is_weight(self) and item in tracer.domains:
            tracer.note("routing", axes[place])
    if any(map(_selects, items)):
        for item in items:
            for rows in tracer.label(item):
                tracer.freeze(rows, "selected by a mask")
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
    axes = tracer.label(self)
    dim = dim % len(axes)
    _tie_indexed(tracer, axes[dim], index, "looked up by position")
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
    axes, chosen = tracer.label(self), tracer.label(index)
    dim = dim % max(len(axes), 1)
    _tie_indexed(tracer, axes[dim], index, "looked up by position")
    _align(tracer, axes, chosen, dim)
    tracer.set_label(call.out, chosen)
    if dim == 0 and tracer.is_weight(self):
        _note_tokens(tracer, index, axes[1:])


@rule("scatter", "scatter_", domain="tied")
@rule("scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
def scatter(
    tracer: Tracer, call: Call, self: Tensor, dim: int, index: Tensor, src: Tensor | None = None
) -> None:
    axes = tracer.label(self)
    dim = dim % max(len(axes), 1)
    _tie_indexed(tracer, axes[dim], index, "written by position")
    _align(tracer, axes, tracer.label(index), dim)
    if src is not None and src.dim() == len(axes):
        _align(tracer, axes, tracer.label(src), dim)
    tracer.set_label(call.out, axes)
    if index in tracer.vocabulary:
        tracer.one_hot[call.out] = True


@rule("index_add", "index_add_", "index_copy", "index_copy_")
def index_add(
    tracer: Tracer, call: Call, self: Tensor, dim: int, index: Tensor, source: Tensor
) -> None:
    axes = tracer.label(self)
    dim = dim % max(len(axes), 1)
    _tie_indexed(tracer, axes[dim], index, "written by position")
    if source.dim() == len(axes):
        values = tracer.label(source)
        tracer.freeze(values[dim], "written by position")
        _align(tracer, axes, values, dim)
    tracer.set_label(call.out, axes)


@rule("index_put", "index_put_", "_index_put_impl_")
def index_put(tracer: Tracer, call: Call, self: Tensor, indices: Indices, values: Tensor) -> None:
    """Writing by position: indexed axes are frozen, the others follow the values."""
    axes = tracer.label(self)
    rest: Axes = []
    place = 0
    for item in indices:
        if item is None:
            rest.append(axes[place])
            place += 1
            continue
        width = item.dim() if _selects(item) else 1
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
@rule("searchsorted", "bucketize", "unique_consecutive", "_unique2")
def found(tracer: Tracer, call: Call) -> None:
    """``nonzero``, ``.item()`` and the like: the code follows the values."""
    for tensor in call.inputs:
        for rows in tracer.label(tensor):
            tracer.freeze(rows, f"the code follows its values ({call.name})")
    for result in call.results:
        rows_of_axes = [tracer.frozen_rows(size, "found by value") for size in result.shape]
        tracer.set_label(result, rows_of_axes)


@rule("bincount", domain="tied")
def bincount(
    tracer: Tracer, call: Call, self: Tensor, weights: Tensor | None, minlength: int
) -> None:
    domain = tracer.domains.get(self)
    _count(
        tracer, call, domain, weights is None and domain is not None and minlength == len(domain)
    )


@rule("histc", domain="tied")
def histc(tracer: Tracer, call: Call, self: Tensor, bins: int, min: float, max: float) -> None:
    domain = tracer.domains.get(self)
    sizes = (bins, min, max)
    _count(tracer, call, domain, domain is not None and sizes == (len(domain), 0, len(domain) - 1))


def _count(tracer: Tracer, call: Call, domain: Any, complete: bool) -> None:
    """How often each position was chosen, if there is one bin for each of them."""
    if complete:
        tracer.set_label(call.out, [domain])
        tracer.counts[call.out] = True
        return
    if domain is not None:
        tracer.freeze(domain, "counted in other bins than its positions")
    found(tracer, call)
