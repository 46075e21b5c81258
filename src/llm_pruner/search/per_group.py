"""Trial removals in each group alone: the measured damage behind one ranking over all groups."""

from __future__ import annotations

import logging
from math import isfinite

import torch
from torch import nn

from llm_pruner.errors import InfeasibleError, UserError
from llm_pruner.planning import Level, Selection, Survivors, trial_removals
from llm_pruner.runtime.progress import track
from llm_pruner.search.divergence import Judge
from llm_pruner.types import Discovery, Scores

_LOG = logging.getLogger(__name__)

TOKENS = 1024
"""Held-out tokens that levels are measured on."""


def measure_levels(
    model: nn.Module,
    discovery: Discovery,
    scores: Scores,
    selection: Selection,
    survivors: Survivors,
    held_out: torch.Tensor,
) -> list[Level]:
    """Return the divergence from the model as it is of every group at a few levels.

    Args:
        held_out: tokens that the scores did not see, shape (samples, seq_len).

    Raises:
        UserError: the logits are not finite.
    """
    trials = trial_removals(discovery, scores, selection, survivors)
    judge = Judge(model, held_out, resume=True)
    levels = []
    try:
        for group, steps, removal in track(trials, "trials: every group alone"):
            try:
                damage = judge.of_removal(discovery, removal)
            except InfeasibleError as error:
                _LOG.info("%s cannot be measured at %d: %s", group, steps, error)
                continue
            if not isfinite(damage):
                raise UserError(
                    f"the logits on the {len(held_out)} calibration samples of the trials are not "
                    "finite, so nothing can be measured; load the model in float32, or use "
                    "--scope local"
                )
            levels.append(Level(group, steps, damage))
            _LOG.info("%s down by %d: divergence %.5f", group, steps, damage)
    finally:
        judge.close()
    return levels
