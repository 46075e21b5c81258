"""Fisher information says how much, and with it the cost after a refit says which.

A group's units are ordered by the geometric mean of two estimates that go wrong in different ways:
the Fisher information of single tokens, sum_t (dL_s/dm_t)^2 (summed over the linear modules that
read a unit), which sees what the loss is sensitive to but is noisy, and the cost in output error
after the consumer is refitted (see `obs`), which sees what the other units can stand for but no
loss. In this order the units take the values that `fisher` gives, sorted: so a ranking across
groups stays the one of `fisher`.

Where others than linear modules read a group, it is `fisher`.
"""

from __future__ import annotations

import numpy as np

from llm_pruner.importance.criteria.fisher import MEASURE as FISHER
from llm_pruner.importance.criteria.obs import MEASURE as OBS
from llm_pruner.importance.observation import Measure, Observation
from llm_pruner.types import FloatArray


def _formula(seen: Observation) -> FloatArray:
    values = FISHER.formula(seen)
    if seen.token_squares is None or not seen.readings:
        return values
    order = np.argsort(seen.token_squares * OBS.formula(seen), kind="stable")
    scores = np.empty_like(values)
    scores[order] = np.sort(values)
    return scores


MEASURE = Measure(
    frozenset({"gates", "tokens"}), _formula, where_linear=frozenset({"moments", "gram"})
)
