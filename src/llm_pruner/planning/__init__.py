"""Importance and a target give a Plan: which units to remove."""

from llm_pruner.planning.allocate import (
    TOLERANCE,
    Allocation,
    allocate,
    check_reachable,
    find_allocation,
)
from llm_pruner.planning.constraints import check, complete
from llm_pruner.planning.costs import Cost, PricedCounter
from llm_pruner.planning.explain import Row, explain
from llm_pruner.planning.measured import Level, smallest_removals, trial_removals
from llm_pruner.planning.numbering import Survivors
from llm_pruner.planning.plan import (
    Plan,
    PlanCalibration,
    PlanCriterion,
    fingerprint,
    read_plan,
)
from llm_pruner.planning.ranges import format_ranges, parse_ranges
from llm_pruner.planning.selection import choose_groups
from llm_pruner.planning.target import (
    STRUCTURES,
    Selection,
    Target,
    parse_count,
    parse_layer_ranges,
    parse_split,
    step_targets,
)

__all__ = [
    "STRUCTURES",
    "TOLERANCE",
    "Allocation",
    "Cost",
    "Level",
    "Plan",
    "PlanCalibration",
    "PlanCriterion",
    "PricedCounter",
    "Row",
    "Selection",
    "Survivors",
    "Target",
    "allocate",
    "check",
    "check_reachable",
    "choose_groups",
    "complete",
    "explain",
    "find_allocation",
    "fingerprint",
    "format_ranges",
    "parse_count",
    "parse_layer_ranges",
    "parse_ranges",
    "parse_split",
    "read_plan",
    "smallest_removals",
    "step_targets",
    "trial_removals",
]
