"""Second-order change of the loss when a unit's gate closes, by the empirical Fisher.

The diagonal of the gates' Hessian is estimated by the mean over samples of the squared derivative,
so closing the gate costs E_s[(dL_s/dm)^2] / 2 (Kwon et al., "A Fast Post-Training Pruning Framework
for Transformers", arXiv 2204.09656, equation 7). Within a sample the squares are taken of segments
of 128 tokens and added up: few long samples alone would make a noisy mean, and single tokens leave
out what tokens share.
"""

from __future__ import annotations

import numpy as np

from llm_pruner.importance.observation import Measure, Observation
from llm_pruner.types import FloatArray


def _formula(seen: Observation) -> FloatArray:
    assert seen.gates is not None
    return np.asarray(np.square(seen.gates).sum(1).mean(0) / 2)


MEASURE = Measure(frozenset({"gates"}), _formula)
