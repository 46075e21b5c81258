"""Elementwise operations, whose inputs shrink together, and new tensors."""

from __future__ import annotations

from torch import Tensor

from llm_pruner.tracing.atoms import empty_rows
from llm_pruner.tracing.functions import require_sight
from llm_pruner.tracing.ops import Call, rule
from llm_pruner.tracing.sizes import code_line
from llm_pruner.tracing.trace import Axes
from llm_pruner.tracing.tracer import Tracer
from llm_pruner.types import IntArray


def broadcast(tracer: Tracer, inputs: list[Tensor], dims: int) -> Axes:
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


@rule("copy", "copy_", "fill_", "zero_", "masked_fill", "masked_fill_", "floor_divide")
@rule("dropout", "native_dropout", "bernoulli")
@rule("complex", "polar")
@rule("pointwise", "mul", "div", makes_weights=True)
@rule("add", "sub", makes_weights=True, keeps_ids=True)
@rule("clamp", "clamp_max", makes_weights=True, keeps_ids=True)
@rule("remainder", "where", keeps_ids=True)
def pointwise(tracer: Tracer, call: Call) -> None:
    """Unify the axes of all inputs; an operation in place labels its target anew."""
    for result in call.results:
        axes = broadcast(tracer, call.inputs, result.dim())
        tracer.set_label(result, axes)


@rule("silu", "gelu", "relu", "sigmoid", "tanh", "leaky_relu", "elu", "softplus", "mish")
@rule("silu_", "gelu_", "relu_", "sigmoid_", "tanh_", "leaky_relu_", "elu_", "mish_")
@rule("hardswish", "hardswish_", "expm1", "expm1_", "exp", "exp_", "threshold", "threshold_")
@rule("log_sigmoid_forward", "_prelu_kernel")
@rule("clamp_min", "clamp_min_", keeps_ids=True)
def activation(tracer: Tracer, call: Call) -> None:
    """Nonlinear functions: the axis they act on is one of a feed-forward network."""
    pointwise(tracer, call)
    if isinstance(call.out, Tensor) and call.out.dim():
        tracer.note("activation", tracer.label(call.out)[-1])


@rule("glu")
def glu(tracer: Tracer, call: Call, self: Tensor, dim: int) -> None:
    """First half times sigmoid of the second: both halves shrink together."""
    axes = tracer.label(self)
    half = call.out.shape[dim]
    axes[dim] = tracer.unify(axes[dim][:half], axes[dim][half:])
    tracer.set_label(call.out, axes)
    tracer.note("activation", axes[dim])


@rule("zeros", "ones", "full", "empty", "scalar_tensor", "empty_strided")
@rule("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", domain="tied")
def uniform(tracer: Tracer, call: Call) -> None:
    """``zeros`` and the like: one value everywhere, so their axes adapt to what they meet."""
    require_sight(tracer, "created")
    axes = [tracer.atoms.fresh(size) for size in call.out.shape]
    tracer.set_label(call.out, axes)
    tracer.unread[call.out] = {int(atom) for rows in axes for atom in rows[:1, 0]}
    tracer.trace.unread |= tracer.unread[call.out]


@rule("zeros_like", "ones_like", "full_like", "empty_like", domain="tied")
def like(tracer: Tracer, call: Call, self: Tensor) -> None:
    """Shaped as their input."""
    tracer.set_label(call.out, tracer.label(self))


@rule("arange", "linspace", "logspace", "tril_indices")
@rule("rand", "randn", "randint", "randperm", "rand_like", "randn_like")
def counting(tracer: Tracer, call: Call) -> None:
    """``arange`` and the like: the values depend on the position."""
    reason = f"computed from positions ({code_line()})"
    tracer.set_label(call.out, tracer.frozen_axes(call.out, reason))


@rule("eye")
def identity(tracer: Tracer, call: Call) -> None:
    """A square ``eye`` stays one when the same rows and columns go; others have no label."""
    require_sight(tracer, "created")
    tracer.set_label(call.out, [tracer.atoms.fresh(call.out.shape[0])] * 2)
