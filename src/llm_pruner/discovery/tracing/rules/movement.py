"""Views, permutations, cuts and joins: axes move, split and merge."""

from __future__ import annotations

import math
from typing import Any

import torch

from llm_pruner.discovery.tracing.atoms import empty_rows, product_rows, stack_rows
from llm_pruner.discovery.tracing.functions import SHAPED_IN_SIGHT
from llm_pruner.discovery.tracing.tracer import Axes, Tracer, UnplacedError

_WHY_FIXED = {
    "multi_head_attention_forward": ", which takes the size of a head from the hidden size",
}


def require_sight(tracer: Tracer) -> None:
    """Refuse a change of sizes inside a function whose arithmetic is not watched.

    A function that is written in C++, or in Python inside PyTorch, may compute sizes from plain
    numbers (``tensor_split``, ``multi_head_attention_forward``); those would not follow a removal.

    Raises:
        UnplacedError: always in such a function.
    """
    if tracer.function not in SHAPED_IN_SIGHT:
        why = _WHY_FIXED.get(str(tracer.function), "")
        raise UnplacedError(f"resized inside {tracer.function or 'compiled code'}{why}")


def view_axes(tracer: Tracer, axes: Axes, shape: tuple[int, ...]) -> Axes:
    """Return the axes of a view in row-major order.

    Old and new sizes are cut into the smallest blocks of equal product; inside a block the old axes
    merge and the merged one splits.
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


def view(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    source = args[0]
    if source.numel() == 0:
        # No tokens: what axes there are beside theirs is known where there are as many without any.
        axes, shape = tracer.label(source), tuple(out.shape)
        kept = [rows for rows in axes if len(rows)]
        if shape.count(0) != len(axes) - len(kept) or math.prod(map(len, kept)) != math.prod(
            filter(None, shape)
        ):
            raise UnplacedError("a view of an empty tensor")
        placed = iter(view_axes(tracer, kept, tuple(filter(None, shape))))
        tracer.set_label(out, [next(placed) if size else empty_rows(0) for size in shape])
        return
    if source.dtype != out.dtype and source.shape == out.shape:
        tracer.copy_label(source, out)
        return
    if _plain_sizes(source) != _plain_sizes(out):
        require_sight(tracer)
    tracer.set_label(out, view_axes(tracer, tracer.label(source), tuple(out.shape)))
    if source in tracer.domains:
        tracer.domains[out] = tracer.domains[source]


def _plain_sizes(tensor: torch.Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def same(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    tracer.copy_label(args[0], out)


def transpose(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
    name = func._overloadpacket.__name__
    axes = tracer.label(args[0])
    if name == "t":
        order = list(range(len(axes)))[::-1]
    elif name == "permute":
        order = [dim % len(axes) for dim in args[1]]
    else:
        order = list(range(len(axes)))
        first, second = args[1] % len(axes), args[2] % len(axes)
        order[first], order[second] = second, first
    tracer.set_label(out, [axes[place] for place in order])
    if args[0] in tracer.domains:
        tracer.domains[out] = tracer.domains[args[0]]
    del kwargs


def squeeze(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    kept = [rows for rows in tracer.label(args[0]) if len(rows) != 1]
    tracer.set_label(out, view_axes(tracer, kept, tuple(out.shape)))
    if args[0] in tracer.domains:
        tracer.domains[out] = tracer.domains[args[0]]


def expand(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    """New positions are replicas: they all hold the same values."""
    axes = tracer.label(args[0])
    axes = [empty_rows(1)] * (out.dim() - len(axes)) + axes
    if [len(rows) for rows in axes] != list(out.shape):
        require_sight(tracer)
    tracer.set_label(
        out,
        [
            rows if len(rows) == size else tracer.atoms.fresh(size, replica=True)
            for rows, size in zip(axes, out.shape, strict=True)
        ],
    )
    if args[0] in tracer.domains:
        tracer.domains[out] = tracer.domains[args[0]]


def repeat(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    require_sight(tracer)
    axes = tracer.label(args[0])
    axes = [empty_rows(1)] * (out.dim() - len(axes)) + axes
    result = []
    for rows, size in zip(axes, out.shape, strict=True):
        if len(rows) == size:
            result.append(rows)
        elif len(rows) == 1:
            result.append(tracer.atoms.fresh(size, replica=True))
        else:
            # Tokens once for each expert: the copies may go with what they meet.
            if tracer.atoms.resolve(rows).size:
                times = tracer.frozen_rows(size // len(rows), "repeated a fixed number of times")
            else:
                times = tracer.atoms.fresh(size // len(rows), replica=True)
            result.append(product_rows(times, rows))
    tracer.set_label(out, result)


def slice_(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    dim = args[1] if len(args) > 1 else 0
    start = args[2] if len(args) > 2 else None
    stop = args[3] if len(args) > 3 else None
    step = args[4] if len(args) > 4 else 1
    axes = tracer.label(args[0])
    if args[0].shape != out.shape:
        require_sight(tracer)
    if axes[dim].shape[0] != out.shape[dim]:
        tracer.cut_from[out] = axes[dim]
    axes[dim] = axes[dim][slice(start, stop, step)]
    tracer.set_label(out, axes)
    if args[0] in tracer.domains:
        tracer.domains[out] = tracer.domains[args[0]]


def select(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    axes = tracer.label(args[0])
    dim = args[1] % len(axes)
    tracer.freeze(axes[dim], "single positions of it are taken")
    tracer.set_label(out, axes[:dim] + axes[dim + 1 :])
    if args[0] in tracer.domains:
        tracer.domains[out] = tracer.domains[args[0]]


def split(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ARG001
    require_sight(tracer)
    axes = tracer.label(args[0])
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(axes)
    start = 0
    for piece in out:
        stop = start + piece.shape[dim]
        tracer.set_label(piece, [*axes[:dim], axes[dim][start:stop], *axes[dim + 1 :]])
        tracer.cut_from[piece] = axes[dim]
        start = stop


def unbind(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ARG001
    axes = tracer.label(args[0])
    dim = (args[1] if len(args) > 1 else 0) % len(axes)
    tracer.freeze(axes[dim], "single positions of it are taken")
    for piece in out:
        tracer.set_label(piece, axes[:dim] + axes[dim + 1 :])


def cat(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    parts = [part for part in args[0] if part.numel() or part.dim() == out.dim()]
    parts = [part for part in parts if part.dim() == out.dim()]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    labels = [tracer.label(part) for part in parts]
    axes: Axes = []
    for place in range(out.dim()):
        rows = [label[place] for label in labels]
        if place == dim:
            axes.append(stack_rows(rows))
            continue
        joined = rows[0]
        for other in rows[1:]:
            joined = tracer.unify(joined, other)
        axes.append(joined)
    if len(axes[dim]) == 1:
        axes[dim] = empty_rows(1)
    tracer.set_label(out, axes)


def stack(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    labels = [tracer.label(part) for part in args[0]]
    axes = labels[0]
    for label in labels[1:]:
        axes = [tracer.unify(a, b) for a, b in zip(axes, label, strict=True)]
    new = tracer.frozen_rows(out.shape[dim], "stacked in the code")
    tracer.set_label(out, [*axes[:dim], new, *axes[dim:]])


def pad(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    axes = tracer.label(args[0])
    for place, size in enumerate(out.shape):
        if len(axes[place]) != size:
            tracer.freeze(axes[place], "padded in the code")
            axes[place] = tracer.frozen_rows(size, "padded in the code")
    tracer.set_label(out, axes)


def reorder(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    """``roll`` and ``flip``: the axes that move keep their length only when nothing is deleted."""
    axes = tracer.label(args[0])
    name = func._overloadpacket.__name__
    dims = args[1] if name == "flip" else (args[2] if len(args) > 2 else [])
    dims = dims if isinstance(dims, list | tuple) else [dims]
    for dim in dims or range(len(axes)):
        tracer.freeze(axes[dim], f"reordered by {name}")
    tracer.set_label(out, axes)


def triangle(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    axes = tracer.label(args[0])
    for rows in axes[-2:]:
        tracer.freeze(rows, "a triangular mask covers it")
    tracer.set_label(out, axes)


def unfold(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    axes = tracer.label(args[0])
    dim = args[1] % len(axes)
    tracer.freeze(axes[dim], "cut into overlapping windows")
    axes[dim] = tracer.frozen_rows(out.shape[dim], "windows")
    axes.append(tracer.frozen_rows(out.shape[-1], "windows"))
    tracer.set_label(out, axes)


def diagonal(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    raise UnplacedError("a diagonal is taken")


def as_complex(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    """Pairs of neighbours become complex numbers; an axis that they were cut from stays even."""
    if args[0] in tracer.cut_from:
        tracer.note("even", tracer.cut_from[args[0]])
    axes = tracer.label(args[0])
    tracer.freeze(axes[-1], "pairs are read as complex numbers")
    tracer.set_label(out, axes[:-1])


def as_real(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    pair = tracer.frozen_rows(2, "pairs are read as complex numbers")
    tracer.set_label(out, [*tracer.label(args[0]), pair])


RULES = {
    "view_as_complex": as_complex,
    "view_as_real": as_real,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten"), view),
    **dict.fromkeys(("clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh"), same),
    **dict.fromkeys(("lift_fresh_copy", "detach_", "view_as", "positive", "resolve_conj"), same),
    **dict.fromkeys(("t", "transpose", "permute"), transpose),
    **dict.fromkeys(("squeeze", "unsqueeze", "squeeze_", "unsqueeze_"), squeeze),
    "expand": expand,
    "repeat": repeat,
    "slice": slice_,
    "select": select,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_split"), split),
    "unbind": unbind,
    "cat": cat,
    "stack": stack,
    "constant_pad_nd": pad,
    **dict.fromkeys((f"reflection_pad{n}d" for n in (1, 2, 3)), pad),
    **dict.fromkeys((f"replication_pad{n}d" for n in (1, 2, 3)), pad),
    **dict.fromkeys(("roll", "flip"), reorder),
    **dict.fromkeys(("tril", "triu", "tril_", "triu_"), triangle),
    "unfold": unfold,
    "diagonal": diagonal,
}
