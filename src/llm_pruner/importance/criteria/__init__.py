"""Criteria that look at activations: one file each, listed here by name."""

from __future__ import annotations

from llm_pruner.importance.criteria.contribution import CONTRIBUTION
from llm_pruner.importance.criteria.fisher import FISHER
from llm_pruner.importance.criteria.fisher_obs import FISHER_OBS
from llm_pruner.importance.criteria.fluctuation import FLUCTUATION
from llm_pruner.importance.criteria.gate import GATE
from llm_pruner.importance.criteria.influence import INFLUENCE
from llm_pruner.importance.criteria.leverage import LEVERAGE
from llm_pruner.importance.criteria.measure import Measure
from llm_pruner.importance.criteria.obs import OBS
from llm_pruner.importance.criteria.reap import REAP
from llm_pruner.importance.criteria.wanda import WANDA

MEASURES: dict[str, Measure] = {
    "gate": GATE,
    "fisher": FISHER,
    "fisher-obs": FISHER_OBS,
    "wanda": WANDA,
    "fluctuation": FLUCTUATION,
    "contribution": CONTRIBUTION,
    "influence": INFLUENCE,
    "obs": OBS,
    "leverage": LEVERAGE,
    "reap": REAP,
}

__all__ = ["MEASURES", "Measure"]
