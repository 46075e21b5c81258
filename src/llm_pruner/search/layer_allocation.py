"""Move units between groups for as long as the pruned model gets nearer to the dense one.

Importance says how much one unit costs while all others stay; what a layer can lose together with
all other layers shows only when the model is run. So neighbours of an allocation are carried out on
copies that share the weights, and each that is nearer to the dense model takes its place: a
hill climb whose steps grow after a gain and shrink after failures (the 1/5th success rule), as in
evolutionary searches with one parent (EvoPress, arXiv 2410.14649).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from math import inf, isfinite

import torch
from torch import nn

from llm_pruner.errors import InfeasibleError, PlanError, UserError
from llm_pruner.planning import Allocation
from llm_pruner.runtime.progress import track
from llm_pruner.search.divergence import Judge
from llm_pruner.search.moves import Moves
from llm_pruner.settings.limits import MOST, MOST_MINUTES, check_number
from llm_pruner.types import Discovery, Removal

_LOG = logging.getLogger(__name__)

DEFAULT_TRIALS = 100
GROW, SHRINK = 1.5, 0.9
FIRST, SMALLEST = 0.25, 0.01
"""How much one group loses, as a share of what it can: at first, and at the least."""

TOKENS = 1024
"""Held-out tokens that steps of the search are judged on."""


@dataclass(frozen=True)
class AllocationSearch:
    """How long to search.

    Attributes:
        trials: allocations that are tried at most.
        minutes: end after this time; the plan then depends on the speed of the machine.
    """

    trials: int = DEFAULT_TRIALS
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise UserError(f"search_trials={self.trials} searches nothing; use 1 or more")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"search_minutes={self.minutes} searches nothing; give more than 0")
        check_number("search_trials", self.trials, 1, MOST)
        check_number("search_minutes", self.minutes, 0, MOST_MINUTES)

    def shared(self, steps: int) -> AllocationSearch:
        """Return what one of several pruning steps gets of it."""
        minutes = None if self.minutes is None else self.minutes / steps
        return AllocationSearch(max(1, self.trials // steps), minutes)


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        trials: allocations that were judged.
        steps: gains among them.
        divergence: before and after, mean over the tokens of the search of KL(dense || pruned), in
            nats.
        confirmed: the same on tokens that the search did not see; None if there were none.
        taken: whether the result was a gain there, too, and so was taken.
    """

    trials: int
    steps: int
    divergence: tuple[float, float]
    confirmed: tuple[float, float] | None
    taken: bool


def search_allocation(
    model: nn.Module,
    discovery: Discovery,
    start: Allocation,
    held_out: torch.Tensor,
    settings: AllocationSearch,
    *,
    within_structures: bool,
    seed: int,
) -> tuple[Allocation, Searched]:
    """Return the best allocation that was found, and how.

    Args:
        held_out: tokens that the scores did not see, shape (samples, seq_len). The last quarter of
            the samples, of at least two, confirms.
        within_structures: keep the split of the budget between structures.

    Raises:
        UserError: there is nothing to move, or the start cannot be judged.
    """
    moves = Moves(start, within_structures=within_structures, seed=seed)
    if not moves.possible:
        raise UserError(
            "a search moves units between layers, and no two groups here can exchange any; use "
            "--allocate even"
        )
    keep = max(1, len(held_out) // 4) if len(held_out) > 1 else 0
    seen = held_out[: max(1, min(len(held_out) - keep, TOKENS // held_out.shape[1]))]
    fresh = held_out[len(held_out) - keep :]
    judge = Judge(model, seen, resume=True)
    best, steps = start, 0
    try:
        first = found = _damage(judge, discovery, start.removal())
        if not isfinite(first):
            raise UserError(
                "the allocation that the search starts from cannot be judged: its logits are not "
                "finite; load the model in float32, or use --allocate even"
            )
        size, tried, begin = FIRST, 0, time.monotonic()
        for _ in track(range(settings.trials), "search"):
            spent = time.monotonic() - begin
            if settings.minutes is not None and spent > 60 * settings.minutes:
                break
            neighbour = moves.draw(best.steps, size)
            if neighbour is None:
                continue
            tried += 1
            candidate = replace(start, steps=neighbour)
            try:
                divergence = _damage(judge, discovery, candidate.removal())
            except PlanError:
                divergence = inf
            gained = divergence < found
            _LOG.info("search: divergence %.4f, best %.4f, size %.3f", divergence, found, size)
            size = min(1.0, size * GROW) if gained else max(SMALLEST, size * SHRINK)
            if gained:
                best, found, steps = candidate, divergence, steps + 1
    finally:
        judge.close()
    confirmed = None
    if len(fresh) and steps:
        judge = Judge(model, fresh)
        before, after = (_damage(judge, discovery, one.removal()) for one in (start, best))
        confirmed = (before, after)
        judge.close()
    taken = steps > 0 and (confirmed is None or confirmed[1] < confirmed[0])
    return best if taken else start, Searched(tried, steps, (first, found), confirmed, taken)


def _damage(judge: Judge, discovery: Discovery, removal: Removal) -> float:
    try:
        found = judge.of_removal(discovery, removal)
    except InfeasibleError:
        return inf
    return found if isfinite(found) else inf
