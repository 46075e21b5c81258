"""The rows of the table of operations (``ops``), by family; importing this fills it."""

from llm_pruner.tracing.rules import contraction, indexing, movement, pointwise, reduction

__all__ = ["contraction", "indexing", "movement", "pointwise", "reduction"]
