"""Structural pruning of language models.

Importing the package registers the hook by which ``transformers`` loads pruned checkpoints whose
layers differ. The public names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from llm_pruner import hook as _hook

if TYPE_CHECKING:
    from llm_pruner.checkpoints import save_checkpoint
    from llm_pruner.discovery.groups import discover
    from llm_pruner.errors import LLMPrunerError, PlanError, UserError, VerificationError
    from llm_pruner.importance import Criterion, score
    from llm_pruner.planning import Plan, Selection, Target, allocate, read_plan
    from llm_pruner.surgery.removal import count_parameters
    from llm_pruner.surgery.verify import prune_, pruned_logits, twin_logits
    from llm_pruner.types import Discovery, Group, Member

try:
    __version__ = version("llm-pruner")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

_HOMES = {
    "Criterion": "importance",
    "Discovery": "types",
    "Group": "types",
    "LLMPrunerError": "errors",
    "Member": "types",
    "Plan": "planning",
    "PlanError": "errors",
    "Selection": "planning",
    "Target": "planning",
    "UserError": "errors",
    "VerificationError": "errors",
    "allocate": "planning",
    "count_parameters": "surgery.removal",
    "discover": "discovery.groups",
    "prune_": "surgery.verify",
    "pruned_logits": "surgery.verify",
    "read_plan": "planning",
    "save_checkpoint": "checkpoints",
    "score": "importance",
    "twin_logits": "surgery.verify",
}
"""Public name -> the module that it comes from."""

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_hook.register()
