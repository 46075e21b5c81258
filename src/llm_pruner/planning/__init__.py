"""Importance and a target give a Plan: which units to remove."""

from llm_pruner.planning.allocate import allocate, check_reachable, with_equal_split
from llm_pruner.planning.candidates import smallest_removals, why_none_can_go
from llm_pruner.planning.costs import Cost
from llm_pruner.planning.match_target import TOLERANCE
from llm_pruner.planning.numbering import Numbering, explain
from llm_pruner.planning.plan import Plan, read_plan
from llm_pruner.planning.selection import (
    Selection,
    Target,
    choose_groups,
    scored_groups,
    step_targets,
)

__all__ = [
    "TOLERANCE",
    "Cost",
    "Numbering",
    "Plan",
    "Selection",
    "Target",
    "allocate",
    "check_reachable",
    "choose_groups",
    "explain",
    "read_plan",
    "scored_groups",
    "smallest_removals",
    "step_targets",
    "why_none_can_go",
    "with_equal_split",
]
