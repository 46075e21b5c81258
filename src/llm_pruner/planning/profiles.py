"""How the share of a structure is laid over the layers, where it is not the same for all."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np

from llm_pruner.planning.candidates import Ladder
from llm_pruner.planning.constraints import scores_of
from llm_pruner.planning.target import Profile
from llm_pruner.types import FloatArray, Group, Scores

LOG_FIRST = 0.5
"""What the first layer loses under ``log``, beside the average of all layers."""

OWL_OUTLIER = 5.0
"""How many times the mean importance of its group a unit has that counts as an outlier."""

OWL_SPREAD = 0.4
"""How far the share of a layer may lie from the average under ``owl``, as a part of it.

The paper's 0.08 at an average of 0.7 is on single weights; at 0.2 of all units this is the same.
"""


def layer_weights(ladders: Sequence[Ladder], scores: Scores, profile: Profile) -> dict[str, float]:
    """Return group -> its share of units to lose over the average of its structure.

    The weights of a structure have mean 1; groups that span all layers have 1.

    - ``even``: 1 everywhere.
    - ``log``: w_i = a + b log(i + 1) / log(n) for the i-th of n layers, a = 0.5 (log-increasing,
      SlimGPT, arXiv 2412.18110: later layers lose more).
    - ``owl``: the more outliers a layer has, that is units of at least 5 times the mean importance,
      the less it loses: w_i = 1 + 0.4 (mean(d) - d_i) / max|mean(d) - d|, with d_i the share of
      outliers (outlier weighed layer-wise sparsity, arXiv 2310.05175, on units).
    """
    weights = {ladder.group.name: 1.0 for ladder in ladders}
    if profile == "even":
        return weights
    for kind in dict.fromkeys(ladder.group.kind for ladder in ladders):
        same = [x.group for x in ladders if x.group.kind == kind and x.group.layer is not None]
        if len({group.layer for group in same}) > 1:
            found = _log(same) if profile == "log" else _owl(same, scores)
            weights.update(zip((group.name for group in same), found.tolist(), strict=True))
    return weights


def _log(groups: Sequence[Group]) -> FloatArray:
    layers = sorted({group.layer or 0 for group in groups})
    rise = np.array(
        [log(layers.index(group.layer or 0) + 1) / log(len(layers)) for group in groups]
    )
    found: FloatArray = LOG_FIRST + rise * (1 - LOG_FIRST) / rise.mean()
    return found


def _owl(groups: Sequence[Group], scores: Scores) -> FloatArray:
    shares = []
    for group in groups:
        values = np.nan_to_num(scores_of(group, scores), posinf=0.0, neginf=0.0)
        shares.append(float(np.mean(values >= OWL_OUTLIER * values.mean())))
    fewer = np.mean(shares) - np.array(shares)
    found: FloatArray = 1 + OWL_SPREAD * fewer / max(float(np.abs(fewer).max()), 1e-12)
    return found
