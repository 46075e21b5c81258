"""First-order change of the loss when a unit's gate closes.

With a gate m of 1 on every unit, dL_s/dm is the sum over tokens of activation times gradient in
sample s. The importance is the mean over samples of its magnitude, summed over the segments of a
long sample (Michel et al., "Are Sixteen
Heads Really Better than One?", arXiv 1905.10650, equation 2).
"""

from __future__ import annotations

import numpy as np

from llm_pruner.importance.observation import Measure, Observation
from llm_pruner.types import FloatArray


def _formula(seen: Observation) -> FloatArray:
    assert seen.gates is not None
    return np.asarray(np.abs(seen.gates).sum(1).mean(0))


MEASURE = Measure(frozenset({"gates"}), _formula)
