"""Lookups: positions taken by value.

An index whose values are known to be positions of a live axis (from ``topk``) lets both shrink
together: what is deleted is never chosen. Any other index freezes the axis that it reads.
"""

from __future__ import annotations

from typing import Any

import torch

from llm_pruner.discovery.tracing.rules.pointwise import broadcast
from llm_pruner.discovery.tracing.tracer import Axes, Tracer, UnplacedError, tensors_in


def _tie_indexed(tracer: Tracer, rows: Any, index: torch.Tensor, what: str) -> None:
    """State what an index does to the axis that it reads or writes."""
    domain = tracer.domains.get(index)
    if domain is not None and len(domain) == len(rows):
        tracer.unify(domain, rows)
        return
    if domain is not None:
        tracer.freeze(domain, what)
    tracer.freeze(rows, "the vocabulary" if index in tracer.vocabulary else what)


def _note_tokens(tracer: Tracer, index: torch.Tensor, tail: Axes) -> None:
    """The first table that tokens index is where the hidden state begins."""
    if index in tracer.vocabulary and tracer.trace.residual is None and tail:
        tracer.trace.residual = tail[-1]


def _inherit(tracer: Tracer, source: torch.Tensor, out: torch.Tensor) -> None:
    """Values taken out of an index tensor index what it indexed."""
    if source in tracer.domains:
        tracer.domains[out] = tracer.domains[source]


def embedding(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    weight, index = args[0], args[1]
    rows, *tail = tracer.label(weight)
    _tie_indexed(tracer, rows, index, "looked up by position")
    tracer.set_label(out, tracer.label(index) + tail)
    _note_tokens(tracer, index, tail)


def index(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    """Advanced indexing: the indexed axes are replaced by those of the index tensors."""
    axes = tracer.label(args[0])
    given = list(args[1]) + [None] * (len(axes) - len(args[1]))
    places = [place for place, item in enumerate(given) if item is not None]
    _inherit(tracer, args[0], out)
    boolean = any(given[place].dtype in (torch.bool, torch.uint8) for place in places)
    for place in places:
        _tie_indexed(tracer, axes[place], given[place], "looked up by position")
        if tracer.is_weight(args[0]) and given[place] in tracer.domains:
            tracer.note("routing", axes[place])
    if boolean:
        for item in (given[place] for place in places):
            for rows in tracer.label(item):
                tracer.freeze(rows, "selected by a mask")
        dims = sum(item.dim() for item in given if item is not None)
        if dims != len(places) or len(places) != 1:
            if places != [0] or len(axes) - dims + 1 != out.dim():
                raise UnplacedError("selected by a mask")
            kept = axes[dims:]
            tracer.set_label(out, [tracer.frozen_rows(out.shape[0], "selected by a mask"), *kept])
            return
        axes[places[0]] = tracer.frozen_rows(out.shape[places[0]], "selected by a mask")
        tracer.set_label(out, axes)
        return
    indices = [given[place] for place in places]
    dims = max(item.dim() for item in indices)
    joined = broadcast(tracer, indices, dims)
    rest = [rows for place, rows in enumerate(axes) if place not in places]
    adjacent = places == list(range(places[0], places[0] + len(places)))
    front = places[0] if adjacent else 0
    tracer.set_label(out, rest[:front] + joined + rest[front:])
    if places == [0] and tracer.is_weight(args[0]):
        _note_tokens(tracer, indices[0], rest)


def index_select(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    _inherit(tracer, args[0], out)
    axes = tracer.label(args[0])
    dim = args[1] % len(axes)
    _tie_indexed(tracer, axes[dim], args[2], "looked up by position")
    axes[dim] = tracer.label(args[2])[0] if args[2].dim() else axes[dim][:1]
    tracer.set_label(out, axes)
    if dim == 0 and tracer.is_weight(args[0]):
        _note_tokens(tracer, args[2], axes[1:])


def _align(tracer: Tracer, axes: Axes, others: Axes, skip: int) -> None:
    for place, (rows, other) in enumerate(zip(axes, others, strict=True)):
        if place == skip:
            continue
        if len(rows) == len(other):
            tracer.unify(rows, other)
        else:
            tracer.freeze(rows, "read in part")
            tracer.freeze(other, "read in part")


def gather(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    _inherit(tracer, args[0], out)
    axes, chosen = tracer.label(args[0]), tracer.label(args[2])
    dim = args[1] % max(len(axes), 1)
    _tie_indexed(tracer, axes[dim], args[2], "looked up by position")
    _align(tracer, axes, chosen, dim)
    tracer.set_label(out, chosen)
    if dim == 0 and tracer.is_weight(args[0]):
        _note_tokens(tracer, args[2], axes[1:])


def scatter(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    axes = tracer.label(args[0])
    dim = args[1] % max(len(axes), 1)
    _tie_indexed(tracer, axes[dim], args[2], "written by position")
    _align(tracer, axes, tracer.label(args[2]), dim)
    if len(args) > 3 and isinstance(args[3], torch.Tensor) and args[3].dim() == len(axes):
        _align(tracer, axes, tracer.label(args[3]), dim)
    tracer.set_label(out, axes)
    if args[2] in tracer.vocabulary:
        tracer.one_hot[out] = True


def index_add(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    axes = tracer.label(args[0])
    dim = args[1] % max(len(axes), 1)
    _tie_indexed(tracer, axes[dim], args[2], "written by position")
    if isinstance(args[3], torch.Tensor) and args[3].dim() == len(axes):
        source = tracer.label(args[3])
        tracer.freeze(source[dim], "written by position")
        _align(tracer, axes, source, dim)
    tracer.set_label(out, axes)


def index_put(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    """Writing by position: indexed axes are frozen, the others follow the values."""
    axes = tracer.label(args[0])
    given = list(args[1]) + [None] * (len(axes) - len(args[1]))
    covered = 0
    rest: Axes = []
    place = 0
    for item in given:
        if place >= len(axes):
            break
        if item is None:
            rest.append(axes[place])
            place += 1
            continue
        width = item.dim() if item.dtype in (torch.bool, torch.uint8) else 1
        for rows in axes[place : place + width]:
            _tie_indexed(tracer, rows, item, "written by position")
        place += width
        covered += 1
    values = tracer.label(args[2])
    for back, rows in enumerate(reversed(rest), start=1):
        if back <= len(values) and len(values[-back]) == len(rows):
            tracer.unify(rows, values[-back])
        elif back <= len(values) and len(values[-back]) != 1:
            raise UnplacedError("written by position")
    for rows in values[: max(len(values) - len(rest), 0)]:
        tracer.freeze(rows, "written by position")
    tracer.set_label(out, axes)


def found(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ARG001
    """``nonzero``, ``.item()`` and the like: the code follows the values."""
    name = func._overloadpacket.__name__
    for tensor in tensors_in(args):
        for rows in tracer.label(tensor):
            tracer.freeze(rows, f"the code follows its values ({name})")
    for result in tensors_in([out]):
        tracer.set_label(
            result, [tracer.frozen_rows(size, "found by value") for size in result.shape]
        )


def count(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
    """``histc`` and ``bincount`` of chosen positions: how often each was chosen."""
    domain = tracer.domains.get(args[0])
    if domain is None or not _counts_all(func._overloadpacket.__name__, args, kwargs, len(domain)):
        if domain is not None:
            tracer.freeze(domain, "counted in other bins than its positions")
        found(tracer, func, args, kwargs, out)
        return
    tracer.set_label(out, [domain])
    tracer.counts[out] = True


def _counts_all(name: str, args: Any, kwargs: Any, size: int) -> bool:
    """Whether there is one bin for each of the positions 0 to size - 1."""
    if name == "bincount":
        weights = args[1] if len(args) > 1 else kwargs.get("weights")
        least = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
        return weights is None and int(least) == size
    names = ("bins", "min", "max")
    given = {"bins": 100, "min": 0, "max": 0, **dict(zip(names, args[1:], strict=False)), **kwargs}
    return (given["bins"], given["min"], given["max"]) == (size, 0, size - 1)


RULES = {
    "embedding": embedding,
    "index": index,
    "index_select": index_select,
    "gather": gather,
    **dict.fromkeys(("scatter", "scatter_", "scatter_add", "scatter_add_"), scatter),
    **dict.fromkeys(("scatter_reduce", "scatter_reduce_"), scatter),
    **dict.fromkeys(("index_add", "index_add_", "index_copy", "index_copy_"), index_add),
    **dict.fromkeys(("index_put", "index_put_", "_index_put_impl_", "index_fill_"), index_put),
    **dict.fromkeys(("nonzero", "_local_scalar_dense", "equal", "is_nonzero"), found),
    **dict.fromkeys(("bincount", "histc"), count),
    **dict.fromkeys(("searchsorted", "bucketize", "unique_consecutive", "_unique2"), found),
}
