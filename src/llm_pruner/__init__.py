"""Structural pruning of language models.

Importing the package registers the hook by which ``transformers`` loads pruned checkpoints whose
layers differ.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.errors import LLMPrunerError, PlanError, UserError, VerificationError
from llm_pruner.groups import discover
from llm_pruner.importance import Criterion, score
from llm_pruner.planning import Plan, Selection, Target, allocate, read_plan
from llm_pruner.removal import count_parameters
from llm_pruner.surgery import prune_
from llm_pruner.types import Discovery, Group, Member
from llm_pruner.verification import pruned_logits, twin_logits

try:
    __version__ = version("llm-pruner")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "Criterion",
    "Discovery",
    "Group",
    "LLMPrunerError",
    "Member",
    "Plan",
    "PlanError",
    "Selection",
    "Target",
    "UserError",
    "VerificationError",
    "__version__",
    "allocate",
    "count_parameters",
    "discover",
    "prune_",
    "pruned_logits",
    "read_plan",
    "save_checkpoint",
    "score",
    "twin_logits",
]
