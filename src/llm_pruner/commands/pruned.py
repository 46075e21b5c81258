"""What a run of ``prune`` did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm_pruner.compensation import Refitted
from llm_pruner.planning import Plan
from llm_pruner.report.data import ImportanceMap
from llm_pruner.search.fast_widths import Rounding
from llm_pruner.surgery.verify import Verified
from llm_pruner.types import Layer, SplitTrial


@dataclass(frozen=True)
class Pruned:
    """What a run did.

    Attributes:
        plan: the Plan, in the numbering of the dense model.
        rows: what is left of every layer.
        parameters: before and after.
        kind: how the checkpoint loads; None if nothing was saved.
        path: the folder or the Plan file written.
        bytes: size of the folder.
        verified: on what the pruned model equals its masked twin; None if it was not compared.
        seconds: by stage.
        refitted: what compensation did to each consumer, all steps.
        trials: splits of the budget that were tried.
        needs: what loading the folder needs besides transformers, such as ``import llm_pruner``.
        report: the page that shows all this; None if none was written.
        importance: of the units, as the first estimate on the dense model gave it; empty if none
            was made.
        rounding: what ``round_to`` was chosen by; None if it was given.
    """

    plan: Plan
    rows: tuple[Layer, ...]
    parameters: tuple[int, int]
    kind: Literal["stock", "recipe"] | None
    path: Path | None
    bytes: int | None
    verified: Verified | None
    seconds: dict[str, float]
    refitted: tuple[Refitted, ...] = ()
    trials: tuple[SplitTrial, ...] = ()
    needs: tuple[str, ...] = ()
    report: Path | None = None
    importance: tuple[ImportanceMap, ...] = ()
    rounding: Rounding | None = None
