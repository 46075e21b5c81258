"""Importance and a target give a Plan: which units to remove."""

from llm_pruner.planning.allocate import allocate as allocate
from llm_pruner.planning.allocate import check_reachable as check_reachable
from llm_pruner.planning.allocate import with_equal_split as with_equal_split
from llm_pruner.planning.candidates import smallest_removals as smallest_removals
from llm_pruner.planning.candidates import why_none_can_go as why_none_can_go
from llm_pruner.planning.costs import Cost as Cost
from llm_pruner.planning.match_target import TOLERANCE as TOLERANCE
from llm_pruner.planning.numbering import Numbering as Numbering
from llm_pruner.planning.numbering import explain as explain
from llm_pruner.planning.plan import Plan as Plan
from llm_pruner.planning.plan import read_plan as read_plan
from llm_pruner.planning.selection import Selection as Selection
from llm_pruner.planning.selection import Target as Target
from llm_pruner.planning.selection import choose_groups as choose_groups
from llm_pruner.planning.selection import scored_groups as scored_groups
from llm_pruner.planning.selection import step_targets as step_targets
