"""How many parameters a model may keep to decode a given share faster: found by timing.

A decoding step of one text reads every weight once and does a few things beside, so its time is
nearly a straight line in the number of parameters; where the line lies depends on the machine. Each
trial removes the same share of every chosen group, times the smaller model against the dense one in
turns, and the line through the last two points gives the next trial.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from llm_pruner.errors import UserError
from llm_pruner.evaluation.speed import compare_speed, speed_up
from llm_pruner.models.layers import sharing_copy
from llm_pruner.planning import Selection, Target, allocate
from llm_pruner.runtime.memory import give_back
from llm_pruner.surgery.cut import prune_
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.types import Discovery

_LOG = logging.getLogger(__name__)

CLOSE = 0.01
"""How far the share of time that is saved may lie from what was asked for, to be content."""

TOLERANCE = 0.05
"""How far it may lie at all, where units are coarse or timings noisy."""

TRIALS = 5
_PROMPT, _NEW, _ROUNDS = 256, 32, 5
"""As `bench` has them: what attention takes grows with the prompt and is not pruned away."""

Timer = Callable[[Any, Any], float]
"""Returns the time of a decoding step of the second model over that of the first."""


@dataclass(frozen=True)
class Timed:
    """One trial.

    Attributes:
        params: what was kept.
        saved: share of the dense model's time of a decoding step, batch 1, that it saved.
    """

    params: int
    saved: float


def params_for_decode_time(
    model: Any,
    discovery: Discovery,
    selection: Selection,
    share: float,
    timer: Timer | None = None,
) -> tuple[int, list[Timed]]:
    """Return the number of parameters to keep, and the trials.

    Args:
        model: the dense model, with weights; left as it was.
        discovery: of this model.
        selection: what may be pruned; a split is kept, the ranking is none.
        share: of the time of a decoding step to save, in (0, 1).
        timer: for tests.

    Raises:
        UserError: no trial came near to it.
    """
    timer = timer or _ratio
    dense = count_parameters(discovery)
    level = replace(selection, scope="local", spread=None, uniform=False, profile="even")
    scores = {group.name: np.zeros(group.size) for group in discovery.groups}
    trials: list[Timed] = []

    params: int | None = round(dense * (1 - share))
    while params is not None and len(trials) < TRIALS:
        wanted = Target(params=max(1, min(params, dense - 1)), loose=True)
        removal = allocate(discovery, scores, level, wanted)
        kept = count_parameters(discovery, removal)
        if any(trial.params == kept for trial in trials):
            break  # units are no finer than this
        copy = sharing_copy(model)
        prune_(copy, discovery, removal)
        trials.append(Timed(kept, 1 - timer(model, copy) if kept < dense else 0.0))
        del copy
        give_back()
        _LOG.info("with %d parameters a step takes %.3f less", kept, trials[-1].saved)
        if abs(trials[-1].saved - share) <= CLOSE:
            break
        params = _next([Timed(dense, 0.0), *trials], share)
    best = min(trials, key=lambda trial: abs(trial.saved - share))
    if abs(best.saved - share) > TOLERANCE:
        raise UserError(
            f"decode_time={share} was not reached in {len(trials)} trials: with {best.params:,} of "
            f"{dense:,} parameters left, a decoding step takes {100 * best.saved:.0f}% less time; "
            "ask for that, protect fewer layers, or choose other structures"
        )
    return best.params, trials


def _next(known: Sequence[Timed], share: float) -> int | None:
    """Return where a straight line saves ``share``: the line nearest to it of those measured."""
    first, second = sorted(known, key=lambda one: abs(one.saved - share))[:2]
    if first.params == second.params or first.saved == second.saved:
        return None
    slope = (second.saved - first.saved) / (second.params - first.params)
    if slope >= 0:  # noise is all that is left between the two
        first, second = known[0], max(known, key=lambda one: one.saved)
        if second.saved <= 0:
            return None
        slope = (second.saved - first.saved) / (second.params - first.params)
    return round(first.params + (share - first.saved) / slope)


def _ratio(dense: Any, pruned: Any) -> float:
    positions = getattr(dense.config.get_text_config(), "max_position_embeddings", None)
    room = positions - _NEW if isinstance(positions, int) and positions > _NEW else _PROMPT
    with torch.inference_mode():
        before, after = compare_speed(
            [dense, pruned], prompt_tokens=min(_PROMPT, room), new_tokens=_NEW, repeats=_ROUNDS
        )
    return 1 / speed_up(before.decode_seconds, after.decode_seconds).median
