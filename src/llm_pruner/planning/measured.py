"""Measured damage: what it costs to take a group down to a few levels, from trial removals.

Estimates of importance are on no common scale: a second-order estimate of the change in loss is off
by factors that differ from layer to layer and from heads to FFN channels. So each group is taken
down alone, least important units first, to a few levels, and how far that takes the model from the
dense one is measured. Between two levels the measured increase is laid out over the steps in
proportion to their importance; beyond the last one it goes on at its rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llm_pruner.errors import UserError
from llm_pruner.planning.candidates import Ladder, Ladders, build_ladders
from llm_pruner.planning.numbering import Survivors
from llm_pruner.planning.selection import choose_groups
from llm_pruner.planning.target import Selection
from llm_pruner.types import Discovery, FloatArray, Group, IntArray, Scores

SHARES = (0.2, 0.45)
"""Shares of a group's units at which it is measured."""

FEW = 3
"""Groups that allow at most so many sizes are measured at each."""


@dataclass(frozen=True)
class Level:
    """One group taken down alone, and the damage.

    Attributes:
        group: name of the group.
        steps: how many steps down its ladder: units, or units of every block.
        damage: any measure of the distance from the dense model, such as a divergence in nats.
    """

    group: str
    steps: int
    damage: float


def trial_removals(
    discovery: Discovery, scores: Scores, selection: Selection, survivors: Survivors
) -> list[tuple[str, int, dict[str, IntArray]]]:
    """Return (group, steps, removal) of all levels that are to be measured.

    Raises:
        UserError: as `allocate`.
    """
    chosen = choose_groups(discovery, selection, survivors)
    ladders = build_ladders(discovery, chosen, scores, selection, survivors)
    return [
        (ladder.group.name, steps, ladders.removal({ladder.group.name: steps}))
        for ladder in ladders.all
        for steps in _steps(ladder)
    ]


def smallest_removals(
    discovery: Discovery, selection: Selection, survivors: Survivors
) -> list[tuple[Group, dict[str, IntArray]]]:
    """Return the smallest removal from each chosen group that can lose something.

    Raises:
        UserError: as `allocate`.
    """
    scores = {group.name: np.zeros(group.size) for group in discovery.groups}
    chosen = choose_groups(discovery, selection, survivors)
    ladders = build_ladders(discovery, chosen, scores, selection, survivors)
    return [
        (ladder.group, ladders.removal({ladder.group.name: int(ladder.counts[1])}))
        for ladder in ladders.all
        if len(ladder.counts) > 1
    ]


def _steps(ladder: Ladder) -> list[int]:
    counts = ladder.counts[1:]
    if len(counts) <= FEW:
        return [int(count) for count in counts]
    if ladder.group.kind == "layers":
        # The first few matter most, and each costs more than the one before.
        half = max(1, int(counts[-1]) // 2)
        wanted = [2**n for n in range(half.bit_length())]
    else:
        wanted = [round(share * (ladder.dense - ladder.gone)) for share in SHARES]
    return sorted({int(counts[np.argmin(np.abs(counts - steps))]) for steps in wanted})


def with_measured_damage(ladders: Ladders, levels: Sequence[Level]) -> Ladders:
    """Return the ladders with measured damage as the importance of their steps.

    Raises:
        UserError: a group was not measured.
    """
    points: dict[str, list[Level]] = {}
    for level in sorted(levels, key=lambda level: level.steps):
        points.setdefault(level.group, []).append(level)
    return replace(ladders, all=tuple(_measured(ladder, points) for ladder in ladders.all))


def _measured(ladder: Ladder, points: Mapping[str, Sequence[Level]]) -> Ladder:
    if len(ladder.counts) == 1:
        return ladder
    if ladder.group.name not in points:
        raise UserError(
            f"nothing was measured of {ladder.group.name}; use scope local or global, or measure it"
        )
    costs = damage_by_step(
        ladder.importance, [(level.steps, level.damage) for level in points[ladder.group.name]]
    )
    return replace(ladder, importance=costs)


def damage_by_step(importance: FloatArray, points: Sequence[tuple[int, float]]) -> FloatArray:
    """Lay out measured damage over steps.

    Args:
        importance: shape (steps,), of each step, ascending.
        points: (steps, damage after so many) in ascending order; no damage after none.

    Returns:
        Shape (steps,): what each step costs, ascending, so that the cheapest come first.
    """
    known = np.isfinite(importance)
    largest = float(importance[known].max(initial=0.0))
    shape = np.maximum(np.where(known, importance, largest).astype(np.float64), 0.0)
    # No step is for free, and where the importance says nothing all are alike.
    shape = shape + (shape.mean() * 1e-3 or 1.0)
    costs = np.empty_like(shape)
    begin, before, rate = 0, 0.0, 0.0
    for end, damage in points:
        rate = max(damage - before, 0.0) / shape[begin:end].sum()
        costs[begin:end] = shape[begin:end] * rate
        begin, before = end, max(damage, before)
    costs[begin:] = shape[begin:] * rate
    ascending: FloatArray = np.maximum.accumulate(costs)
    return ascending
