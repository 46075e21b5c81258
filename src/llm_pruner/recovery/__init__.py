"""Training after pruning: adapters or weights, from text and from the dense model."""

from llm_pruner.recovery.guard import Progress
from llm_pruner.recovery.recover import Outcome, recover_
from llm_pruner.recovery.scoring import Evaluation
from llm_pruner.recovery.settings import PRESETS, LoraSettings, RecoverySettings, preset
from llm_pruner.recovery.teacher import DistillationSettings, Teacher
from llm_pruner.recovery.training import RunState

__all__ = [
    "PRESETS",
    "DistillationSettings",
    "Evaluation",
    "LoraSettings",
    "Outcome",
    "Progress",
    "RecoverySettings",
    "RunState",
    "Teacher",
    "preset",
    "recover_",
]
