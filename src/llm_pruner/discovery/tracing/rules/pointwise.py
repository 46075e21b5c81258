"""Element by element (all inputs shrink together, broadcasting aside), and new tensors."""

from __future__ import annotations

from typing import Any

import torch

from llm_pruner.discovery.tracing.atoms import empty_rows
from llm_pruner.discovery.tracing.code import code_line
from llm_pruner.discovery.tracing.functions import SHAPED_IN_SIGHT
from llm_pruner.discovery.tracing.tracer import Axes, Tracer, UnplacedError, tensors_in
from llm_pruner.types import IntArray

NONLINEAR = frozenset(
    {"silu", "gelu", "relu", "sigmoid", "tanh", "leaky_relu", "elu", "softplus", "mish"}
    | {"hardswish", "expm1", "exp", "threshold", "clamp_min", "log_sigmoid_forward"}
)


def broadcast(tracer: Tracer, inputs: list[torch.Tensor], dims: int) -> Axes:
    """Unify the axes of all inputs, aligned from the right, and return those of the result."""
    axes: Axes = []
    shapes = [tensor.shape for tensor in inputs]
    labels = [
        tracer.label(tensor) if any(size != 1 for size in shape) else []
        for tensor, shape in zip(inputs, shapes, strict=True)
    ]
    for place in range(dims, 0, -1):
        joined: IntArray | None = None
        for shape, label in zip(shapes, labels, strict=True):
            if len(shape) < place or shape[-place] == 1:
                continue
            rows = label[-place]
            joined = rows if joined is None else tracer.unify(joined, rows)
        axes.append(empty_rows(1) if joined is None else joined)
    return axes


def pointwise(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Unify everything that meets; an operation in place labels its target anew."""
    inputs = tensors_in([*args, *kwargs.values()])
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


def uniform(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ARG001
    """``zeros`` and the like hold one value everywhere: their axes adapt to what they meet."""
    if tracer.function not in SHAPED_IN_SIGHT:
        raise UnplacedError(f"created inside {tracer.function or 'compiled code'}")
    for result in tensors_in([out]):
        tracer.set_label(result, [tracer.atoms.fresh(size) for size in result.shape])


def like(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ARG001
    """``zeros_like`` and the like: shaped as their input."""
    tracer.set_label(out, tracer.label(args[0]))


def counting(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ARG001
    """``arange`` and the like: the values depend on the position."""
    reason = f"computed from positions ({code_line()})"
    for result in tensors_in([out]):
        tracer.set_label(result, [tracer.frozen_rows(size, reason) for size in result.shape])


def identity(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """``eye`` stays one when the same rows and columns go."""
    if out.shape[0] != out.shape[1]:
        counting(tracer, func, args, kwargs, out)
        return
    if tracer.function not in SHAPED_IN_SIGHT:
        raise UnplacedError(f"created inside {tracer.function or 'compiled code'}")
    tracer.set_label(out, [tracer.atoms.fresh(out.shape[0])] * 2)


RULES = {
    "glu": glu,
    **dict.fromkeys(("pointwise", *_OTHERS.split()), pointwise),
    "eye": identity,
    **dict.fromkeys(("zeros", "ones", "full", "empty", "scalar_tensor", "empty_strided"), uniform),
    **dict.fromkeys(
        ("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"), uniform
    ),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), like),
    **dict.fromkeys(("arange", "linspace", "logspace", "tril_indices"), counting),
    **dict.fromkeys(("rand", "randn", "randint", "randperm", "rand_like", "randn_like"), counting),
}
