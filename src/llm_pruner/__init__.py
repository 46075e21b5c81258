"""Structural pruning of language models.

Importing the package registers what it adds to ``transformers``, such as the loader of pruned
checkpoints whose layers differ. The public names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llm_pruner import hook as _hook

if TYPE_CHECKING:
    from llm_pruner.api import Lora as Lora
    from llm_pruner.api import Model as Model
    from llm_pruner.api import Scores as Scores
    from llm_pruner.api import Taylor as Taylor
    from llm_pruner.api import calibration as calibration
    from llm_pruner.api import curve as curve
    from llm_pruner.api import discover as discover
    from llm_pruner.api import health as health
    from llm_pruner.api import load as load
    from llm_pruner.api import perplexity as perplexity
    from llm_pruner.api import plan as plan
    from llm_pruner.api import presets as presets
    from llm_pruner.api import prune_ as prune_
    from llm_pruner.api import recover_ as recover_
    from llm_pruner.api import refit_ as refit_
    from llm_pruner.api import score as score
    from llm_pruner.checkpoints import save_checkpoint as save_checkpoint
    from llm_pruner.errors import DiscoveryError as DiscoveryError
    from llm_pruner.errors import InfeasibleError as InfeasibleError
    from llm_pruner.errors import LLMPrunerError as LLMPrunerError
    from llm_pruner.errors import PlanError as PlanError
    from llm_pruner.errors import UserError as UserError
    from llm_pruner.errors import VerificationError as VerificationError
    from llm_pruner.importance import Criterion as Criterion
    from llm_pruner.planning import Plan as Plan
    from llm_pruner.planning import Selection as Selection
    from llm_pruner.planning import Target as Target
    from llm_pruner.planning import allocate as allocate
    from llm_pruner.planning import read_plan as read_plan
    from llm_pruner.settings.prune import PlanSettings as PlanSettings
    from llm_pruner.settings.prune import PruneSettings as PruneSettings
    from llm_pruner.settings.recover import RecoverSettings as RecoverSettings
    from llm_pruner.settings.recover import TrainingSettings as TrainingSettings
    from llm_pruner.surgery.removal import count_parameters as count_parameters
    from llm_pruner.surgery.twin import pruned_logits as pruned_logits
    from llm_pruner.surgery.twin import twin_logits as twin_logits
    from llm_pruner.types import Discovery as Discovery
    from llm_pruner.types import Group as Group
    from llm_pruner.types import Member as Member
    from llm_pruner.version import __version__ as __version__

_NAMES = {
    "api": "Lora Model Scores Taylor calibration curve discover health load perplexity plan "
    "presets prune_ recover_ refit_ score",
    "checkpoints": "save_checkpoint",
    "errors": "DiscoveryError InfeasibleError LLMPrunerError PlanError UserError VerificationError",
    "importance": "Criterion",
    "planning": "Plan Selection Target allocate read_plan",
    "settings.prune": "PlanSettings PruneSettings",
    "settings.recover": "RecoverSettings TrainingSettings",
    "surgery.removal": "count_parameters",
    "surgery.twin": "pruned_logits twin_logits",
    "types": "Discovery Group Member",
    "version": "__version__",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
"""Public name -> the module that it comes from."""

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_hook.register()
