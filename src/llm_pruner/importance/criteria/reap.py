"""Router-weighted activations of experts.

S_j = 1/|X_j| sum_{x in X_j} g_j(x) ||f_j(x)||_2, with X_j the tokens that the router sends to
expert j, g_j its weight and f_j its output: an expert matters that adds much where it is asked
(REAP, Lasby et al., arXiv 2510.13999).
"""

from __future__ import annotations

from llm_pruner.importance.criteria.measure import Measure
from llm_pruner.importance.observation import Observation
from llm_pruner.types import FloatArray


def _formula(seen: Observation) -> FloatArray:
    assert seen.routed is not None
    return seen.routed


REAP = Measure(frozenset({"routed"}), _formula, kinds=frozenset({"experts"}))
