"""Find the removal whose exact parameter count is nearest to a target.

All rungs (allowed steps) of all ladders stand in one *queue*. Taking the first m rungs removes more
the larger m is, so bisection finds the m around the target. Where the rung at the crossing is a
coarse one (a head of a small model), its ladder is held just above or below it and the others are
bisected again: the fine ladders take up the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from llm_pruner.planning.candidates import Ladder, Ladders
from llm_pruner.planning.costs import Counter
from llm_pruner.types import FloatArray, IntArray

_MOST_BISECTIONS = 64  # enough for every structure at once; bounds the time of a hopeless search
_MOST_COMBINATIONS = 256


@dataclass(frozen=True)
class Queue:
    """Rungs in the order in which they are taken.

    Attributes:
        owners: ladders that move together, rung by rung; they have the same ``counts``.
        sequence: owner index of each rung, in order.
        price: shape (owners,), parameters that one step of the owner removes from the dense model.
    """

    owners: tuple[tuple[Ladder, ...], ...]
    sequence: IntArray
    price: FloatArray


@dataclass
class Search:
    """Candidates around a target; ``best`` is the nearest, ``below``/``above`` its neighbours."""

    ladders: Ladders
    counter: Counter
    target: int
    tolerance: float
    allow_nothing: bool
    counts: set[int] = field(default_factory=set)
    best: tuple[int, dict[str, int]] | None = None
    base: Mapping[str, int] = field(default_factory=dict)
    _budget: int = 0

    @property
    def error(self) -> float:
        """Distance of the best candidate from the target, in parameters."""
        return float("inf") if self.best is None else abs(self.best[0] - self.target)

    def try_steps(self, steps: Mapping[str, int]) -> int:
        """Count what is left after ``steps`` and remember it if it is the nearest so far.

        Steps in ``base`` are taken as well.
        """
        steps = {**self.base, **steps}
        count = self.counter.count(self.ladders.removal(steps))
        if any(steps.values()) or self.allow_nothing:
            self.counts.add(count)
            if abs(count - self.target) < self.error:
                self.best = (count, dict(steps))
        return count

    def run(self, queue: Queue) -> None:
        """Search one queue, holding coarse ladders as needed."""
        self._budget = _MOST_BISECTIONS
        self._explore(queue, {})

    def run_all(self, queue: Queue) -> None:
        """Try every level of all ladders but the finest, if these are few."""
        finest = int(np.argmin(queue.price))
        others = [owner for owner in range(len(queue.owners)) if owner != finest]
        levels = [range(len(queue.owners[owner][0].counts)) for owner in others]
        if np.prod([float(len(level)) for level in levels]) > _MOST_COMBINATIONS:
            return
        for combination in product(*levels):
            self._budget = 1
            self._explore(queue, dict(zip(others, combination, strict=True)))
            if self.error <= self.tolerance:
                return

    def _explore(self, queue: Queue, held: dict[int, int]) -> None:
        if self._budget <= 0:
            return
        self._budget -= 1
        free = queue.sequence[~np.isin(queue.sequence, list(held))]
        place, low, high = self._bisect(queue, held, free)
        if place is None:
            return
        crossing = int(free[place])
        prices = [p for owner, p in enumerate(queue.price) if owner not in held]
        # Nothing finer than the rung at the crossing: this is as close as it gets here.
        if self.error <= min(queue.price) / 2 or queue.price[crossing] <= min(prices):
            return
        level = int(np.count_nonzero(free[:place] == crossing))
        sides = (
            (level, level + 1) if low - self.target <= self.target - high else (level + 1, level)
        )
        for side in sides:
            self._explore(queue, {**held, crossing: side})
            if self.error <= self.tolerance:
                return

    def _bisect(
        self, queue: Queue, held: Mapping[int, int], free: IntArray
    ) -> tuple[int | None, int, int]:
        """Return the place of the rung that crosses the target and the counts around it.

        The place is None where the whole queue lies on one side of the target.
        """

        def count(rungs: int) -> int:
            return self.try_steps(_steps(queue, held, free[:rungs]))

        low, high = 0, len(free)
        above, below = count(low), count(high)
        if above <= self.target or below > self.target:
            if above <= self.target and len(free):
                count(1)  # the smallest removal, for when removing nothing does not count
            return None, above, below
        while high - low > 1:
            middle = (low + high) // 2
            here = count(middle)
            if here > self.target:
                low, above = middle, here
            else:
                high, below = middle, here
        return low, above, below


def _steps(queue: Queue, held: Mapping[int, int], taken: IntArray) -> dict[str, int]:
    levels = np.bincount(taken, minlength=len(queue.owners))
    for owner, level in held.items():
        levels[owner] = level
    return {
        ladder.group.name: int(ladder.counts[level])
        for owner, level in zip(queue.owners, levels, strict=True)
        for ladder in owner
    }


def step_prices(ladders: Ladders, counter: Counter) -> dict[str, int]:
    """Return how much of a cost one step of each group removes from the unpruned model."""
    prices: dict[str, int] = {}
    for ladder in ladders.all:
        # The first rung, since companions may forbid a single step.
        step = int(ladder.counts[1]) if len(ladder.counts) > 1 else 0
        left = counter.count(ladders.removal({ladder.group.name: step}))
        prices[ladder.group.name] = max((counter.total - left) // max(step, 1), 1)
    return prices


def density(ladder: Ladder, price: int) -> FloatArray:
    """Return importance per removed parameter of each rung, shape (rungs,), not decreasing."""
    if len(ladder.counts) == 1:
        return np.zeros(0)
    sums = np.add.reduceat(ladder.importance, ladder.counts[:-1])
    values = sums / (np.diff(ladder.counts) * price)
    # An infinite importance minus another is no number; such a unit goes last.
    return np.maximum.accumulate(np.nan_to_num(values, nan=np.inf, posinf=np.inf, neginf=-np.inf))


def share_after(ladder: Ladder) -> FloatArray:
    """Return, for each rung, the share of the dense group at which taking it is nearest.

    That is the share in the middle between before and after the rung, shape (rungs,).
    """
    middle = (ladder.counts[:-1] + ladder.counts[1:]) / 2
    return np.asarray((ladder.gone + middle) / max(ladder.dense, 1), dtype=np.float64)


def make_queue(
    owners: Sequence[Sequence[Ladder]],
    prices: Mapping[str, int],
    keys: Callable[[Ladder], tuple[FloatArray, ...]],
) -> Queue:
    """Return the rungs of all owners sorted by ``keys``, then by owner, then by rung.

    Args:
        owners: ladders that move together; the keys of the first are taken.
        prices: parameters per step, by group name.
        keys: ladder -> sort keys of its rungs, the most significant first.
    """
    rows = [keys(owner[0]) for owner in owners]
    index = np.concatenate([np.full(len(row[0]), i, dtype=np.int64) for i, row in enumerate(rows)])
    columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
    sequence = index[np.lexsort((index, *reversed(columns)))]
    price = [
        float(sum(prices[ladder.group.name] for ladder in owner)) * _first_rung(owner[0])
        for owner in owners
    ]
    return Queue(tuple(tuple(owner) for owner in owners), sequence, np.array(price))


def _first_rung(ladder: Ladder) -> int:
    return int(np.diff(ladder.counts).max(initial=1))
