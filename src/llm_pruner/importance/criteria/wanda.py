"""Weight magnitude times activation norm, summed over the consumer's column.

S_j = ||x_j||_2 * sum_i |W_ij| (Sun et al., arXiv 2306.11695, equation 1, summed over a structure as
the "Wanda-sp" of An et al., arXiv 2312.11983).
"""

from __future__ import annotations

import numpy as np

from llm_pruner.importance.observation import Measure, Reading, over_readings
from llm_pruner.types import FloatArray


def _magnitude(reading: Reading) -> FloatArray:
    weight = reading.weight.double().abs().sum(0).cpu().numpy()
    return reading.by_unit(np.sqrt(reading.square) * weight)


MEASURE = Measure(frozenset({"moments"}), over_readings(_magnitude))
