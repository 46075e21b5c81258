"""Find the removal whose exact cost is nearest to a target.

The *increments* from each candidate of a group to its next stand in one *queue*. Taking the first m
of them removes more the larger m is, so bisection finds the m around the target. Where the
increment at the crossing is a coarse one (a head of a small model), its group is held just above or
below it and the others are bisected again: the finely divided groups take up the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from llm_pruner.planning.candidates import AllCandidates, Candidates
from llm_pruner.planning.costs import Cost
from llm_pruner.types import FloatArray, IntArray

TOLERANCE = 0.005
"""How far the removed share of all parameters may lie from the target."""

_MOST_BISECTIONS = 64  # enough for every structure at once; bounds the time of a hopeless search
_MOST_COMBINATIONS = 256


@dataclass(frozen=True)
class Queue:
    """Increments in the order in which they are taken.

    Attributes:
        price: shape (owners,), parameters that the largest increment of an owner removes.
    """

    owners: tuple[tuple[Candidates, ...], ...]
    sequence: IntArray
    price: FloatArray


@dataclass
class Search:
    """Removals around a target; ``counts`` are the costs of all that were tried.

    ``best`` is the nearest so far, (cost, steps); ``base``: steps that are taken in any case.
    """

    candidates: AllCandidates
    cost: Cost
    target: int
    allow_nothing: bool
    counts: set[int] = field(default_factory=set)
    best: tuple[int, dict[str, int]] | None = None
    base: Mapping[str, int] = field(default_factory=dict)
    _budget: int = 0

    @property
    def error(self) -> float:
        """Distance of the best removal from the target."""
        return float("inf") if self.best is None else abs(self.best[0] - self.target)

    @property
    def met(self) -> bool:
        """Whether the best removal is near enough."""
        return self.error <= TOLERANCE * self.cost.dense

    def try_steps(self, steps: Mapping[str, int]) -> int:
        """Count what is left after ``steps`` and ``base``; remember it if it is the nearest."""
        steps = {**self.base, **steps}
        count = self.cost.left(self.candidates.removal(steps))
        if any(steps.values()) or self.allow_nothing:
            self.counts.add(count)
            if abs(count - self.target) < self.error:
                self.best = (count, dict(steps))
        return count

    def run(self, queue: Queue) -> None:
        """Search one queue, holding coarse groups as needed."""
        self._budget = _MOST_BISECTIONS
        self._explore(queue, {})

    def run_all(self, queue: Queue) -> None:
        """Try every candidate of all groups but the finest, if these are few."""
        finest = int(np.argmin(queue.price))
        others = [owner for owner in range(len(queue.owners)) if owner != finest]
        places = [range(len(queue.owners[owner][0].counts)) for owner in others]
        if np.prod([float(len(place)) for place in places]) > _MOST_COMBINATIONS:
            return
        for combination in product(*places):
            self._budget = 1
            self._explore(queue, dict(zip(others, combination, strict=True)))
            if self.met:
                return

    def _explore(self, queue: Queue, held: dict[int, int]) -> None:
        """Bisect with some owners held at a candidate: owner index -> its place in ``counts``."""
        if self._budget <= 0:
            return
        self._budget -= 1
        free = queue.sequence[~np.isin(queue.sequence, list(held))]
        place, low, high = self._bisect(queue, held, free)
        if place is None:
            return
        crossing = int(free[place])
        prices = [p for owner, p in enumerate(queue.price) if owner not in held]
        # Nothing finer than the increment at the crossing: this is as close as it gets here.
        if self.error <= min(queue.price) / 2 or queue.price[crossing] <= min(prices):
            return
        before = int(np.count_nonzero(free[:place] == crossing))
        nearer_before = low - self.target <= self.target - high
        for side in (before, before + 1) if nearer_before else (before + 1, before):
            self._explore(queue, {**held, crossing: side})
            if self.met:
                return

    def _bisect(
        self, queue: Queue, held: Mapping[int, int], free: IntArray
    ) -> tuple[int | None, int, int]:
        """Return where the queue crosses the target, None if nowhere, and the costs around."""

        def count(taken: int) -> int:
            return self.try_steps(_steps(queue, held, free[:taken]))

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
    places = np.bincount(taken, minlength=len(queue.owners))
    for owner, place in held.items():
        places[owner] = place
    return {
        one.group.name: int(one.counts[place])
        for owner, place in zip(queue.owners, places, strict=True)
        for one in owner
    }


Prices = Mapping[str, IntArray]
"""Group name -> how much of a cost each increment removes from the unpruned model."""


def increment_prices(candidates: AllCandidates, cost: Cost) -> Prices:
    """Return what each increment of each group removes, if it goes alone."""
    prices: dict[str, IntArray] = {}
    for one in candidates.all:
        name, increments = one.group.name, np.diff(one.counts)
        if one.group.modules:  # layers need not be alike
            prices[name] = cost.freed(name, one.order[-1][: len(increments)])
        else:
            # The smallest removal, since companions may forbid a single step.
            step = int(one.counts[:2].sum())
            left = cost.left(candidates.removal({name: step}))
            prices[name] = increments * max((cost.total - left) // max(step, 1), 1)
    return prices


def density(one: Candidates, prices: Prices) -> FloatArray:
    """Return importance per removed parameter of each increment, not decreasing."""
    if len(one.counts) == 1:
        return np.zeros(0)
    values = np.add.reduceat(one.importance, one.counts[:-1]) / prices[one.group.name]
    # An infinite importance minus another is no number; such a unit goes last.
    return np.maximum.accumulate(np.nan_to_num(values, nan=np.inf, posinf=np.inf, neginf=-np.inf))


def share_after(one: Candidates) -> FloatArray:
    """Return, for each increment, the dense share in the middle between before and after it."""
    middle = (one.counts[:-1] + one.counts[1:]) / 2
    return np.asarray((one.gone + middle) / max(one.dense, 1), dtype=np.float64)


def make_queue(
    owners: Sequence[Sequence[Candidates]],
    prices: Prices,
    *keys: Callable[[Candidates], FloatArray],
) -> Queue:
    """Return the increments of all owners sorted by ``keys``, then by owner, then as they come.

    ``owners`` move together, by keys of the first; ``keys``: candidates -> keys, the main first.
    """
    columns = [np.concatenate([key(owner[0]) for owner in owners]) for key in keys]
    index = np.concatenate(
        [np.full(len(owner[0].counts) - 1, i, dtype=np.int64) for i, owner in enumerate(owners)]
    )
    sequence = index[np.lexsort((index, *reversed(columns)))]
    price = [
        np.sum([prices[one.group.name] for one in owner], axis=0).max(initial=1) for owner in owners
    ]
    return Queue(tuple(map(tuple, owners)), sequence, np.array(price, dtype=np.float64))
