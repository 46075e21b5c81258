"""How far each group can be pruned, and at what price.

A *step* removes one unit, or, in a group with blocks, one unit of every block that stays. The
*candidates* of a group are the numbers of steps that are allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import lcm
from typing import Any

import numpy as np

from llm_pruner.errors import UserError
from llm_pruner.planning.constraints import (
    add_companions,
    ascending,
    dead_blocks,
    followers,
    removed_layers,
    scores_of,
)
from llm_pruner.planning.costs import Cost
from llm_pruner.planning.numbering import Numbering
from llm_pruner.planning.selection import Selection, choose_groups, removable_layers
from llm_pruner.types import Discovery, FloatArray, Group, IntArray, Place, Scores

CHANNELS = ("ffn", "hidden", "head_dim", "other")
"""Kinds whose kept number ``round_to`` rounds."""


@dataclass(frozen=True)
class Candidates:
    """The numbers of steps that one group may lose.

    Attributes:
        importance: shape (counts[-1],), what each step costs in importance, companions included.
    """

    group: Group
    order: Mapping[int, IntArray]
    counts: IntArray
    dense: int
    gone: int
    importance: FloatArray

    def nearest(self, steps: int) -> int:
        """Return the allowed number of steps that is nearest, of two the smaller."""
        return int(self.counts[np.argmin(np.abs(self.counts - steps))])


@dataclass(frozen=True)
class AllCandidates:
    """The candidates of all chosen groups; ``groups`` are all of the model.

    ``orders``: units of the chosen groups and of what follows them, least important first.
    """

    all: tuple[Candidates, ...]
    groups: Mapping[str, Group]
    orders: Mapping[str, IntArray]

    @property
    def most(self) -> dict[str, int]:
        """The largest number of steps of each group, by its name."""
        return {one.group.name: int(one.counts[-1]) for one in self.all}

    def by_kind(self) -> dict[str, list[Candidates]]:
        """Return the candidates of each structure."""
        found: dict[str, list[Candidates]] = {}
        for one in self.all:
            found.setdefault(one.group.kind, []).append(one)
        return found

    def removal(self, steps: Mapping[str, int]) -> dict[str, IntArray]:
        """Return the removal, companions included, that takes ``steps[group name]`` steps.

        Units of layers and blocks that are gone anyway are not named. Units are not sorted.
        """
        removal: dict[str, IntArray] = {}
        gone: set[Place] = set()
        taken = [one for one in self.all if steps.get(one.group.name, 0)]
        # Layers say which groups are gone anyway, and the other groups which blocks are.
        taken.sort(key=lambda one: (one.group.kind != "layers", one.group.blocks is not None))
        for one in taken:
            if one.group.place in gone:
                continue
            count = steps[one.group.name]
            dead = set(dead_blocks(one.group, removal).tolist())
            parts = [units[:count] for block, units in one.order.items() if block not in dead]
            removal[one.group.name] = np.concatenate(parts)
            if one.group.kind == "layers":
                gone = removed_layers(self.groups, removal)
        add_companions(self.groups, removal, gone, self.orders)
        return removal


def find_candidates(
    discovery: Discovery,
    scores: Scores,
    selection: Selection,
    numbering: Numbering,
    cost: Cost | None = None,
) -> AllCandidates:
    """Return what the groups that a selection prunes may lose."""
    chosen = choose_groups(discovery, selection, numbering)
    groups = discovery.by_name
    orders: dict[str, IntArray] = {}
    waiting = list(chosen)
    while waiting:
        group = waiting.pop()
        if group.name not in orders:
            orders[group.name] = ascending(group, scores)
            waiting.extend(other for _, other in followers(group, groups))
    asked = (groups, orders, scores, selection, numbering, cost)
    found = AllCandidates(tuple(_candidates(group, *asked) for group in chosen), groups, orders)
    for same in found.by_kind().values():
        # In a later step, a group that has nothing left to lose has done its part.
        if all(len(one.counts) == 1 and not one.gone for one in same):
            raise UserError(_stuck(same[0].group, groups, selection))
    return found


def why_none_can_go(discovery: Discovery, selection: Selection, structure: str) -> str | None:
    """Return why no group of a structure can lose anything; None if one can."""
    everywhere: dict[str, Any] = {"layer_ranges": {}, "protect_first": 0, "protect_last": 0}
    whole = replace(selection, structures=(structure,), split=None, **everywhere)
    scores = {group.name: np.zeros(group.size) for group in discovery.groups}
    try:
        find_candidates(discovery, scores, whole, Numbering.dense(discovery))
    except UserError as error:
        return str(error).rpartition("; ")[0]  # without what to change
    return None


def smallest_removals(
    discovery: Discovery, selection: Selection, numbering: Numbering
) -> list[tuple[Group, dict[str, IntArray]]]:
    """Return the smallest removal from each chosen group that can lose some."""
    scores = {group.name: np.zeros(group.size) for group in discovery.groups}
    found = find_candidates(discovery, scores, selection, numbering)
    return [
        (one.group, found.removal({one.group.name: int(one.counts[1])}))
        for one in found.all
        if len(one.counts) > 1
    ]


def _candidates(
    group: Group,
    groups: Mapping[str, Group],
    orders: Mapping[str, IntArray],
    scores: Scores,
    selection: Selection,
    numbering: Numbering,
    cost: Cost | None,
) -> Candidates:
    units = orders[group.name]
    dense_group = numbering.groups[numbering.names[group.name]]
    if group.blocks is not None:
        blocks = group.blocks
        order = {int(block): units[blocks[units] == block] for block in np.unique(blocks)}
        most = min(len(part) for part in order.values())
        assert dense_group.blocks is not None
        dense = int(np.unique(dense_group.blocks, return_counts=True)[1].min())
        gone, limit = dense - most, most - 1
    elif group.kind == "layers":
        removable = removable_layers(dense_group, selection, numbering)
        left = units[np.isin(numbering.kept[dense_group.name][units], removable)]
        free = left if cost is None else _worth(group, left, scores, selection, cost)
        order, dense = {-1: free}, len(removable)
        gone, limit = dense - len(left), min(len(free), group.size - 1)
    else:
        order = {-1: units}
        dense, limit = dense_group.size, group.size - group.least
        gone = dense - group.size
    if cost is not None and not cost.freed(group.name, order[min(order)][:1]).any():
        limit = 0
    counts = _allowed(group, groups, selection, limit)
    importance = np.sum(
        [scores_of(group, scores)[part[: counts[-1]]] for part in order.values()], axis=0
    )
    for companion, other in followers(group, groups):
        ends = [int(companion.ratio * step) for step in range(int(counts[-1]) + 1)]
        values = scores_of(other, scores)[orders[other.name]]
        importance = importance + np.array([values[a:b].sum() for a, b in pairwise(ends)])
    return Candidates(group, order, counts, dense, gone, importance)


def _worth(
    group: Group, units: IntArray, scores: Scores, selection: Selection, cost: Cost
) -> IntArray:
    """Return the layers that free some of a cost, in the order in which they go."""
    freed = cost.freed(group.name, units)
    units, freed = units[freed > 0], freed[freed > 0]
    if selection.scope == "local":
        return units
    return units[np.argsort(scores_of(group, scores)[units] / freed, kind="stable")]


def _allowed(
    group: Group, groups: Mapping[str, Group], selection: Selection, limit: int
) -> IntArray:
    multiple = 1
    for companion, other in followers(group, groups):
        multiple = lcm(multiple, companion.ratio.denominator)
        most = 0 if other.frozen is not None else other.size - other.least
        limit = min(limit, int(most / companion.ratio))
    counts = np.arange(0, max(limit, 0) + 1, dtype=np.int64)
    good = counts % multiple == 0
    wanted = selection.round_to if group.kind in CHANNELS else 1
    wanted = selection.heads_to if group.kind == "heads" else wanted
    kept_multiple = lcm(wanted, group.multiple)
    good &= (group.size - counts) % kept_multiple == 0
    good[0] = True
    return counts[good]


def _stuck(group: Group, groups: Mapping[str, Group], selection: Selection) -> str:
    """Say why a group can lose nothing, and behind the last semicolon what to change."""
    why = f"{group.name} can lose nothing of its {group.size} units"
    frozen = [other for _, other in followers(group, groups) if other.frozen is not None]
    if frozen:
        why += f", because {frozen[0].name}, which follows it, cannot: {frozen[0].frozen}"
    elif group.kind in CHANNELS and group.size > 1 and selection.round_to > 1:
        why += f": round_to={selection.round_to} leaves no smaller size"
    elif group.kind == "heads" and selection.heads_to > 1:
        why += f": it keeps a multiple of {selection.heads_to}"
    return f"{why}; leave {group.kind} out of the structures, or round to less"
