"""Element by element: all inputs shrink together, broadcasting aside."""

from __future__ import annotations

from typing import Any

import torch

from llm_pruner.discovery.tracing.atoms import empty_rows
from llm_pruner.discovery.tracing.tracer import Axes, Tracer, tensors_in
from llm_pruner.types import IntArray

NONLINEAR = frozenset(
    {"silu", "gelu", "relu", "sigmoid", "tanh", "leaky_relu", "elu", "softplus", "mish"}
    | {"hardswish", "expm1", "exp", "threshold", "clamp_min", "log_sigmoid_forward"}
)


def broadcast(tracer: Tracer, inputs: list[torch.Tensor], dims: int) -> Axes:
    """Unify the axes of all inputs, aligned from the right, and return those of the result."""
    axes: Axes = []
    for place in range(dims, 0, -1):
        joined: IntArray | None = None
        for tensor in inputs:
            if tensor.dim() < place or tensor.shape[-place] == 1:
                continue
            rows = tracer.label(tensor)[-place]
            joined = rows if joined is None else tracer.unify(joined, rows)
        axes.append(empty_rows(1) if joined is None else joined)
    return axes


def pointwise(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Unify everything that meets; an operation in place labels its target anew."""
    inputs = [*tensors_in(args), *tensors_in(kwargs.values())]
    for result in tensors_in([out]):
        axes = broadcast(tracer, inputs, result.dim())
        if [len(rows) for rows in axes] != list(result.shape):
            # All inputs have one position where the result has several: it was resized in place.
            axes = [
                rows if len(rows) == size else tracer.atoms.fresh(size)
                for rows, size in zip(axes, result.shape, strict=True)
            ]
        tracer.set_label(result, axes)
    name = func._overloadpacket.__name__.rstrip("_")
    if name in NONLINEAR and isinstance(out, torch.Tensor) and out.dim():
        tracer.note("activation", tracer.label(out)[-1])
    if name == "eq" and args[0] in tracer.vocabulary and isinstance(args[1], torch.Tensor):
        tracer.one_hot[out] = True


def glu(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:  # noqa: ARG001
    """First half times the sigmoid of the second: both halves shrink together."""
    axes = tracer.label(args[0])
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % len(axes)
    half = out.shape[dim]
    axes[dim] = tracer.unify(axes[dim][:half], axes[dim][half:])
    tracer.set_label(out, axes)
    tracer.note("activation", axes[dim])


_OTHERS = """
    copy copy_ fill_ zero_ masked_fill masked_fill_ floor_divide lerp nan_to_num where clamp clamp_
    dropout native_dropout bernoulli threshold glu_pointwise addcmul addcdiv log_sigmoid_forward
    logaddexp softplus mish hardtanh elu relu_ silu_
"""
RULES = {"glu": glu, **dict.fromkeys(("pointwise", *_OTHERS.split()), pointwise)}
