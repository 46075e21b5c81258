"""What makes a removal possible: `check` finds every breach, companions are added."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from fractions import Fraction

import numpy as np

from llm_pruner.errors import UserError
from llm_pruner.files.ranges import format_ranges
from llm_pruner.surgery.removal import unit_problems
from llm_pruner.types import (
    Companion,
    Discovery,
    FloatArray,
    Group,
    IntArray,
    Place,
    Removal,
    Scores,
)

NONE: IntArray = np.zeros(0, dtype=np.int64)


def removed_layers(groups: Mapping[str, Group], removal: Removal) -> set[Place]:
    """Return the decoder layers that the removal takes whole."""
    return {
        (groups[name].path, layer)
        for name, units in removal.items()
        if len(units) and name in groups and groups[name].kind == "layers"
        for layer in groups[name].layers[units].tolist()
    }


def dead_blocks(group: Group, removal: Removal) -> IntArray:
    """Return the blocks that are gone because their own group loses them."""
    return NONE if group.owner is None else removal.get(group.owner, NONE)


def followers(group: Group, groups: Mapping[str, Group]) -> list[tuple[Companion, Group]]:
    """Return what must lose units when a group does, with the group, of what there is."""
    return [(one, groups[one.group]) for one in group.companions if one.group in groups]


def check(discovery: Discovery, removal: Removal, unreadable: Collection[str] = ()) -> list[str]:
    """Return every reason why the removal cannot be applied.

    - Units are unique and in range, and at least one of a group stays.
    - A frozen group loses nothing.
    - Groups with blocks: every block that stays loses the same number of units and keeps one. A
      block goes only through the group whose units are the blocks (key-value heads).
    - Companions lose exactly their ratio, except in layers that are removed whole.
    - A layer that is removed whole has no other units to lose.
    """
    groups = discovery.by_name
    problems: list[str] = []
    sound: dict[str, IntArray] = {}
    broken = set(unreadable)
    for name, units in removal.items():
        found = _check_units(groups, name, units)
        problems.extend(found)
        if found:
            broken.add(name)
        else:
            sound[name] = np.asarray(units, dtype=np.int64)
    gone = removed_layers(groups, sound)
    for name, units in sound.items():
        group = groups[name]
        if group.place in gone and len(units):
            problems.append(
                f"{name}: layer {group.layer} is removed whole, so its units cannot be named again"
            )
        elif group.blocks is not None:
            problems.extend(_check_blocks(group, group.blocks, units, dead_blocks(group, sound)))
    for group in discovery.groups:
        # A group with a problem of its own says nothing about its companions.
        if group.place not in gone and group.name not in broken:
            problems.extend(_check_companions(group, groups, sound, broken, gone))
    return problems


def _check_units(groups: Mapping[str, Group], name: str, units: IntArray) -> list[str]:
    group = groups.get(name)
    if group is None:
        close = difflib.get_close_matches(name, groups, n=1)
        return [f"{name}: no such group" + (f"; did you mean {close[0]}?" if close else "")]
    return [f"{name}: {problem}" for problem in unit_problems(group, units)]


def _check_blocks(group: Group, blocks: IntArray, units: IntArray, dead: IntArray) -> list[str]:
    lost, sizes = np.bincount(blocks[units], minlength=int(blocks.max()) + 1), np.bincount(blocks)
    live = np.setdiff1d(np.unique(blocks), dead)
    problems: list[str] = []
    emptied = live[lost[live] == sizes[live]]
    if len(emptied):
        way = f"remove units {format_ranges(emptied)} of {group.owner} instead"
        problems.append(
            f"{group.name}: removes every unit of blocks {format_ranges(emptied)}; "
            f"{way if group.owner else 'keep one'}"
        )
    live = np.setdiff1d(live, emptied)
    if len(live) and np.ptp(lost[live]):
        counts = [f"{lost[block]} of block {block}" for block in live]
        problems.append(
            f"{group.name}: every block that stays must lose the same number of units; this "
            f"removes {', '.join(counts)}"
        )
    return problems


def _check_companions(
    group: Group,
    groups: Mapping[str, Group],
    sound: Removal,
    broken: Collection[str],
    gone: set[Place],
) -> list[str]:
    problems: list[str] = []
    lost = len(sound.get(group.name, NONE))
    for companion, other in followers(group, groups):
        if other.place in gone or other.name in broken:
            continue
        need = companion.ratio * lost
        have = len(sound.get(other.name, NONE))
        mutual = any(back.group == group.name for back in other.companions)
        # Of two that follow each other, only the one that lost too much reports the other.
        if need == have or (mutual and need < have):
            continue
        if need.denominator != 1:
            problems.append(
                f"{group.name}: loses {lost} units, which takes {float(need):g} of {other.name}; "
                f"remove a multiple of {companion.ratio.denominator}"
            )
        else:
            problems.append(
                f"{other.name}: loses {have} units but must lose {int(need)}, because "
                f"{group.name} loses {lost} and each takes {companion.ratio} with it"
            )
    return problems


def scores_of(group: Group, scores: Scores) -> FloatArray:
    """Return the importance of a group's units, shape (size,); UserError unless that is given."""
    if group.name not in scores:
        raise UserError(
            f"there is no importance for {group.name}; use a criterion that scores {group.kind}"
        )
    values = np.asarray(scores[group.name], dtype=np.float64)
    if values.shape != (group.size,) or np.isnan(values).any():
        raise UserError(
            f"the importance of {group.name} is not one number for each of its {group.size} units; "
            "check the criterion, and the calibration loss"
        )
    return values


def ascending(group: Group, scores: Scores) -> IntArray:
    """Return the units of a group, least important first; ties go by unit index."""
    return np.argsort(scores_of(group, scores), kind="stable").astype(np.int64)


def add_companions(
    groups: Mapping[str, Group],
    removal: dict[str, IntArray],
    gone: set[Place],
    orders: Mapping[str, IntArray],
) -> None:
    """Add to ``removal`` what companions, and theirs, must lose, least important units first."""
    waiting = [name for name in removal if groups[name].companions]
    while waiting:
        group = groups[waiting.pop()]
        for companion, other in followers(group, groups):
            if other.place in gone:
                continue
            have = removal.get(other.name, NONE)
            missing = whole(companion.ratio * len(removal[group.name])) - len(have)
            if missing <= 0:
                continue
            units = orders[other.name]
            if len(have):
                units = units[~np.isin(units, have)]
            removal[other.name] = np.concatenate([have, units[:missing]])
            if other.companions:
                waiting.append(other.name)


def whole(number: Fraction) -> int:
    """Return the smallest integer that is not below ``number``."""
    return -(-number.numerator // number.denominator)
