"""Variance of the activation times squared norm of the consumer's column.

S_j = Var[x_j] * ||W_:j||^2: what is lost beyond a constant that a bias could hold (FLAP, An et al.,
arXiv 2312.11983, equation 4).
"""

from __future__ import annotations

from llm_pruner.importance.observation import Measure, Reading, over_readings
from llm_pruner.types import FloatArray


def _fluctuation(reading: Reading) -> FloatArray:
    return reading.by_unit(reading.variance * reading.weight_norms)


MEASURE = Measure(frozenset({"moments"}), over_readings(_fluctuation))
