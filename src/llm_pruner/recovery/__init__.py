"""Training after pruning: adapters or weights, from text and from the dense model."""

from llm_pruner.recovery.callbacks import Progress
from llm_pruner.recovery.distill import Teacher
from llm_pruner.recovery.repair import repair_
from llm_pruner.recovery.run import Outcome, recover_

__all__ = ["Outcome", "Progress", "Teacher", "recover_", "repair_"]
