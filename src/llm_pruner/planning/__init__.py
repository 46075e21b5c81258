"""Importance and a target give a Plan: which units to remove."""

from llm_pruner.files.ranges import format_ranges, parse_ranges
from llm_pruner.planning.allocate import (
    TOLERANCE,
    allocate,
    check_reachable,
)
from llm_pruner.planning.candidates import smallest_removals
from llm_pruner.planning.constraints import check, complete
from llm_pruner.planning.costs import Cost, PricedCounter
from llm_pruner.planning.numbering import Survivors, explain
from llm_pruner.planning.plan import (
    Plan,
    fingerprint,
    read_plan,
)
from llm_pruner.planning.selection import choose_groups
from llm_pruner.planning.target import Selection, Target, step_targets
from llm_pruner.settings.words import STRUCTURES, parse_count, parse_layer_ranges, parse_split

__all__ = [
    "STRUCTURES",
    "TOLERANCE",
    "Cost",
    "Plan",
    "PricedCounter",
    "Selection",
    "Survivors",
    "Target",
    "allocate",
    "check",
    "check_reachable",
    "choose_groups",
    "complete",
    "explain",
    "fingerprint",
    "format_ranges",
    "parse_count",
    "parse_layer_ranges",
    "parse_ranges",
    "parse_split",
    "read_plan",
    "smallest_removals",
    "step_targets",
]
