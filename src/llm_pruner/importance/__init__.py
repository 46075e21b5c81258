"""Estimation: how much the loss would rise without a unit."""

from llm_pruner.importance.criteria import Criterion
from llm_pruner.importance.scoring import score

__all__ = ["Criterion", "score"]
