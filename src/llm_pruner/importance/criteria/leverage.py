"""Ridge leverage of a unit's activations among those of its consumer.

l_j = [C (C + lambda I)^-1]_jj is near 0 for a feature that the others can express and near 1 for
one that they cannot (Alaoui and Mahoney, arXiv 1411.0306, definition 1); a unit has the sum over
its features.
"""

from __future__ import annotations

import torch

from llm_pruner.importance.criteria.obs import regular_inverse
from llm_pruner.importance.observation import Measure, Reading, over_readings
from llm_pruner.types import FloatArray

RIDGE = 1.0
"""Share of the mean diagonal of C that is added to the diagonal."""


def _leverage(reading: Reading) -> FloatArray:
    assert reading.gram is not None
    gram = reading.gram.double() / max(reading.tokens, 1)
    damping = RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    features = 1.0 - damping * regular_inverse(gram, RIDGE).diagonal()
    return reading.by_unit(features.cpu().numpy())


MEASURE = Measure(frozenset({"moments", "gram"}), over_readings(_leverage))
