"""Mean energy that a unit adds to its consumer's output.

S_j = E[x_j^2] * ||W_:j||^2, summed over the features of a unit, as if these were uncorrelated.
"""

from __future__ import annotations

import numpy as np

from llm_pruner.importance.observation import Measure, Observation
from llm_pruner.types import FloatArray


def _formula(seen: Observation) -> FloatArray:
    return np.sum(
        [reading.by_unit(reading.mean_square * reading.weight_norms) for reading in seen.readings],
        axis=0,
    )


MEASURE = Measure(frozenset({"moments"}), _formula)
