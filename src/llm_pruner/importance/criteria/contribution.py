"""Mean energy that a unit adds to its consumer's output.

S_j = E[x_j^2] * ||W_:j||^2, summed over the features of a unit, as if these were uncorrelated.
"""

from __future__ import annotations

from llm_pruner.importance.observation import Measure, Reading, over_readings
from llm_pruner.types import FloatArray


def _energy(reading: Reading) -> FloatArray:
    return reading.by_unit(reading.mean_square * reading.weight_norms)


MEASURE = Measure(frozenset({"moments"}), over_readings(_energy))
