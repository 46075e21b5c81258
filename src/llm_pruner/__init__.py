"""Structural pruning of language models.

Importing the package registers the hook by which ``transformers`` loads pruned checkpoints whose
layers differ. The public names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llm_pruner import hook as _hook
from llm_pruner.version import __version__

if TYPE_CHECKING:
    from llm_pruner.api import (
        Lora,
        Model,
        Taylor,
        calibration,
        discover,
        load,
        perplexity,
        plan,
        presets,
        prune_,
        recover_,
        refit_,
        score,
    )
    from llm_pruner.checkpoints import save_checkpoint
    from llm_pruner.errors import LLMPrunerError, PlanError, UserError, VerificationError
    from llm_pruner.importance import Criterion
    from llm_pruner.planning import Plan, Selection, Target, allocate, read_plan
    from llm_pruner.settings.prune import PlanSettings, PruneSettings
    from llm_pruner.settings.recover import RecoverSettings, TrainingSettings
    from llm_pruner.surgery.removal import count_parameters
    from llm_pruner.surgery.verify import pruned_logits, twin_logits
    from llm_pruner.types import Discovery, Group, Member

_HOMES = {
    "Criterion": "importance",
    "Discovery": "types",
    "Group": "types",
    "LLMPrunerError": "errors",
    "Lora": "api",
    "Member": "types",
    "Model": "api",
    "Plan": "planning",
    "PlanError": "errors",
    "PlanSettings": "settings.prune",
    "PruneSettings": "settings.prune",
    "RecoverSettings": "settings.recover",
    "Selection": "planning",
    "Target": "planning",
    "Taylor": "api",
    "TrainingSettings": "settings.recover",
    "UserError": "errors",
    "VerificationError": "errors",
    "allocate": "planning",
    "calibration": "api",
    "count_parameters": "surgery.removal",
    "discover": "api",
    "load": "api",
    "perplexity": "api",
    "plan": "api",
    "presets": "api",
    "prune_": "api",
    "pruned_logits": "surgery.verify",
    "read_plan": "planning",
    "recover_": "api",
    "refit_": "api",
    "save_checkpoint": "checkpoints",
    "score": "api",
    "twin_logits": "surgery.verify",
}
"""Public name -> the module that it comes from."""

__all__ = [
    "Criterion",
    "Discovery",
    "Group",
    "LLMPrunerError",
    "Lora",
    "Member",
    "Model",
    "Plan",
    "PlanError",
    "PlanSettings",
    "PruneSettings",
    "RecoverSettings",
    "Selection",
    "Target",
    "Taylor",
    "TrainingSettings",
    "UserError",
    "VerificationError",
    "__version__",
    "allocate",
    "calibration",
    "count_parameters",
    "discover",
    "load",
    "perplexity",
    "plan",
    "presets",
    "prune_",
    "pruned_logits",
    "read_plan",
    "recover_",
    "refit_",
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
