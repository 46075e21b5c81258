"""Variance of the activation times squared norm of the consumer's column.

S_j = Var[x_j] * ||W_:j||^2: what is lost beyond a constant that a bias could hold (FLAP, An et al.,
arXiv 2312.11983, equation 4).
"""

from __future__ import annotations

import numpy as np

from llm_pruner.importance.observation import Measure, Observation
from llm_pruner.types import FloatArray


def _formula(seen: Observation) -> FloatArray:
    return np.sum(
        [reading.by_unit(reading.variance * reading.weight_norms) for reading in seen.readings],
        axis=0,
    )


MEASURE = Measure(frozenset({"moments"}), _formula)
