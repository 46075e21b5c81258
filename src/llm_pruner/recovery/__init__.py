"""Training after pruning: adapters or weights, from text and from the dense model."""

from llm_pruner.recovery.callbacks import Progress
from llm_pruner.recovery.distill import Teacher
from llm_pruner.recovery.run import Outcome, recover_
from llm_pruner.recovery.scoring import Evaluation
from llm_pruner.recovery.trainer import RunState
from llm_pruner.settings.recover import DistillationSettings, TrainingSettings

__all__ = [
    "DistillationSettings",
    "Evaluation",
    "Outcome",
    "Progress",
    "RunState",
    "Teacher",
    "TrainingSettings",
    "recover_",
]
