"""Rules: how the axes of an operation's result follow from those of its inputs, by family."""

from __future__ import annotations

from collections.abc import Callable

from llm_pruner.discovery.tracing.rules import (
    contraction,
    indexing,
    movement,
    pointwise,
    reduction,
)

RULES: dict[str, Callable[..., None]] = {
    **pointwise.RULES,
    **movement.RULES,
    **contraction.RULES,
    **reduction.RULES,
    **indexing.RULES,
}
"""Name of the ATen operation -> rule(tracer, func, args, kwargs, out)."""
