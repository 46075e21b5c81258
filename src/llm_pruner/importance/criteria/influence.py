"""Block influence of whole layers.

BI = 1 - E_t[cos(h_in, h_out)]: a layer that hardly turns the hidden state matters little (ShortGPT,
Men et al., arXiv 2403.03853, equation 1).
"""

from __future__ import annotations

from llm_pruner.importance.criteria.measure import Measure
from llm_pruner.importance.observation import Observation
from llm_pruner.types import FloatArray


def _formula(seen: Observation) -> FloatArray:
    assert seen.influence is not None
    return seen.influence


INFLUENCE = Measure(frozenset({"influence"}), _formula, kinds=frozenset({"layers"}))
