"""Sums, norms and softmax: an axis is summed over or normalised along."""

from __future__ import annotations

from typing import Any

import torch

from llm_pruner.discovery.tracing.atoms import empty_rows
from llm_pruner.discovery.tracing.tracer import Axes, Tracer, tensors_in


def reduced_dims(name: str, args: Any, kwargs: Any, dims: int) -> list[int]:
    """Return the axes that an operation reduces over, counted from the left."""
    position = 2 if name in ("linalg_vector_norm", "norm") else 1
    given = args[position] if len(args) > position else kwargs.get("dim")
    if name in ("var", "std") and isinstance(given, bool):
        given = None
    if given is None or (isinstance(given, list | tuple) and not given):
        return list(range(dims))
    given = given if isinstance(given, list | tuple) else [given]
    return [int(dim) % max(dims, 1) for dim in given]


def reduce(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Drop the reduced axes, or keep them with one position."""
    name = func._overloadpacket.__name__
    axes = tracer.label(args[0])
    gone = reduced_dims(name, args, kwargs, len(axes))
    for dim in gone if axes else ():
        tracer.require_whole(axes[dim])
        if name == "sum":
            tracer.note("read", axes[dim])
    for result in tensors_in([out]):
        if result.dim() == len(axes):
            kept: Axes = [empty_rows(1) if i in gone else rows for i, rows in enumerate(axes)]
        else:
            kept = [rows for i, rows in enumerate(axes) if i not in gone]
        tracer.set_label(result, kept)
        if not result.dtype.is_floating_point and name in ("argmax", "argmin", "max", "min"):
            tracer.domains[result] = axes[gone[0]]


def along(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ARG001
    """Softmax and the like: every axis stays."""
    axes = tracer.label(args[0])
    if axes:
        tracer.require_whole(axes[args[1]])
        tracer.note("normalised", axes[args[1]])
    for result in tensors_in([out]):
        tracer.set_label(result, axes)


def running(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ARG001
    """Running sums: a position depends on all before it.

    Counts of choices are zero where something is deleted, so that the other sums stay.
    """
    axes = tracer.label(args[0])
    counted = args[0] in tracer.counts and func._overloadpacket.__name__ == "cumsum"
    if not counted:
        tracer.freeze(axes[args[1]], "summed position after position")
    for result in tensors_in([out]):
        tracer.set_label(result, axes)
        if counted:
            tracer.counts[result] = True


def layer_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ARG001
    """``native_layer_norm`` and ``_fused_rms_norm``: weight and bias follow the last axes."""
    axes = tracer.label(args[0])
    count = len(args[1])
    for rows in axes[-count:]:
        tracer.require_whole(rows)
    for weight in args[2:4]:
        if isinstance(weight, torch.Tensor):
            for place, rows in enumerate(tracer.label(weight)):
                axes[place - count] = tracer.unify(axes[place - count], rows)
    results = tensors_in([out])
    tracer.set_label(results[0], axes)
    for statistic in results[1:]:
        tracer.set_label(statistic, axes[:-count] + [empty_rows(1)] * count)


def weight_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ARG001
    """v * g / |v|, the norm taken over all axes of v but one."""
    axes, scale = tracer.label(args[0]), tracer.label(args[1])
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(axes)
    for place, rows in enumerate(axes):
        if place != dim:
            tracer.require_whole(rows)
    axes[dim] = tracer.unify(axes[dim], scale[dim])
    tracer.set_label(out[0], axes)
    tracer.set_label(out[1], scale)


def select_along(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """``topk`` and ``sort``: the positions of the result are chosen by value."""
    name = func._overloadpacket.__name__
    axes = tracer.label(args[0])
    if name == "topk":
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
    else:
        dim = kwargs.get("dim", args[-2] if len(args) > 2 else (args[1] if len(args) > 1 else -1))
    dim = int(dim) % len(axes)
    source = axes[dim]
    tracer.require_whole(source)
    results = tensors_in([out])
    if name == "topk":
        tracer.note("read", source)
        tracer.choose(args[0], dim, results[0].shape[dim])
    else:
        tracer.freeze(source, f"ordered by {name}")
    axes[dim] = empty_rows(1) if len(axes[dim]) == 1 else axes[dim]
    for result in results:
        rows = tracer.frozen_rows(result.shape[dim], f"chosen by {name}")
        tracer.set_label(result, [*axes[:dim], rows, *axes[dim + 1 :]])
    # The first result holds values, the second their positions; argsort gives positions alone.
    tracer.domains[results[-1]] = source
    if len(results) > 1 and args[0] in tracer.domains:
        # Positions in order are in order as well once some are deleted and the rest renumbered.
        tracer.domains[results[0]] = tracer.domains[args[0]]


RULES = {
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "max", "min", "var", "std", "prod", "any", "all"), reduce
    ),
    **dict.fromkeys(
        ("argmax", "argmin", "logsumexp", "linalg_vector_norm", "norm", "var_mean"), reduce
    ),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "_safe_softmax"), along),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "logcumsumexp"), running),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layer_norm),
    "_weight_norm_interface": weight_norm,
    **dict.fromkeys(("topk", "sort", "argsort"), select_along),
}
