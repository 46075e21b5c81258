"""New tensors: constant ones take any shape, ones that count positions are fixed."""

from __future__ import annotations

from typing import Any

from llm_pruner.discovery.tracing.code import code_line
from llm_pruner.discovery.tracing.functions import SHAPED_IN_SIGHT
from llm_pruner.discovery.tracing.tracer import Tracer, UnplacedError, tensors_in


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
    "eye": identity,
    **dict.fromkeys(("zeros", "ones", "full", "empty", "scalar_tensor", "empty_strided"), uniform),
    **dict.fromkeys(
        ("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"), uniform
    ),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), like),
    **dict.fromkeys(("arange", "linspace", "logspace", "tril_indices"), counting),
    **dict.fromkeys(("rand", "randn", "randint", "randperm", "rand_like", "randn_like"), counting),
}
