"""Neighbours of an allocation: as many parameters, laid out a little differently over the groups.

A search takes them one by one. Each lets some groups keep more units and others fewer. With a split
between structures, units move between groups of one structure only; without, between all. What is
then missing from the number of parameters is made up in the structure of the finest steps, evenly.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llm_pruner.planning.allocate import Allocation
from llm_pruner.planning.candidates import Ladder
from llm_pruner.planning.match_target import step_prices

_PASSES = 4
"""Corrections of the number of parameters, each of what the last one missed."""


class Moves:
    """Draws neighbours of allocations with the number of parameters of the first one.

    Args:
        start: where the search begins.
        within_structures: whether each structure keeps its share.
        seed: of all draws.
    """

    def __init__(self, start: Allocation, *, within_structures: bool, seed: int) -> None:
        self._start = start
        self._within = within_structures
        self._random = np.random.default_rng(seed)
        self._counter = start.cost.counter
        self._prices = step_prices(start.ladders, self._counter)
        self._ladders = {x.group.name: x for x in start.ladders.all if len(x.counts) > 1}
        self._target = self._count(start.steps)

    @property
    def possible(self) -> bool:
        """Whether there are two groups between which units can move."""
        pools = self._pools()
        return any(len(pool) > 1 for pool in pools)

    def draw(self, steps: Mapping[str, int], size: float) -> dict[str, int] | None:
        """Return a neighbour of ``steps``, or None if the draw led to none.

        Args:
            steps: group -> steps down its ladder.
            size: how much one group loses, as a share of what its ladder allows, in (0, 1].
        """
        pools = [pool for pool in self._pools() if len(pool) > 1]
        if not pools:
            return None
        sizes = np.array([len(pool) for pool in pools], dtype=np.float64)
        pool = pools[int(self._random.choice(len(pools), p=sizes / sizes.sum()))]
        count = min(len(pool) // 2, int(self._random.geometric(0.5)))
        names = [pool[i] for i in self._random.permutation(len(pool))[: 2 * count]]
        found = dict(steps)
        for losing, keeping in zip(names[::2], names[1::2], strict=True):
            wanted = size * float(self._random.uniform(0.2, 1.0))
            amount = max(1, round(wanted * int(self._ladders[losing].counts[-1])))
            before = found[losing]
            found[losing] = self._ladders[losing].nearest(before + amount)
            lost = (found[losing] - before) * self._prices[losing]
            back = round(lost / self._prices[keeping])
            found[keeping] = self._ladders[keeping].nearest(max(0, found[keeping] - back))
        found = self._made_up(found, {self._ladders[name].group.kind for name in pool})
        if found == dict(steps) or abs(self._count(found) - self._target) > self._finest():
            return None
        return found

    def _pools(self) -> list[list[str]]:
        if not self._within:
            return [list(self._ladders)]
        kinds: dict[str, list[str]] = {}
        for name, ladder in self._ladders.items():
            kinds.setdefault(ladder.group.kind, []).append(name)
        return list(kinds.values())

    def _count(self, steps: Mapping[str, int]) -> int:
        return self._counter.count(self._start.ladders.removal(steps))

    def _finest(self) -> int:
        """Return the parameters of the smallest rung: no allocation need be nearer than that."""
        return min(self._prices[name] * _rung(ladder) for name, ladder in self._ladders.items())

    def _made_up(self, steps: dict[str, int], kinds: set[str]) -> dict[str, int]:
        """Take or give back what the number of parameters is off by."""
        within = [name for name, ladder in self._ladders.items() if ladder.group.kind in kinds]
        cost = {name: self._prices[name] * _rung(self._ladders[name]) for name in within}
        finest = min(cost.values())
        fine = [name for name in within if cost[name] < 2 * finest]
        for _ in range(_PASSES):
            excess = self._count(steps) - self._target
            if abs(excess) <= self._finest():
                break
            order = [fine[i] for i in self._random.permutation(len(fine))]
            for place, name in enumerate(order):
                share = excess / (len(order) - place)
                ladder, before = self._ladders[name], steps[name]
                after = before + round(share / self._prices[name])
                steps[name] = ladder.nearest(max(0, after))
                excess -= (steps[name] - before) * self._prices[name]
        return steps


def _rung(ladder: Ladder) -> int:
    return int(np.diff(ladder.counts).min(initial=int(ladder.counts[1])))
