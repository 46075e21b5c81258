"""What a language model returns."""

from __future__ import annotations

from typing import Any

import torch

from llm_pruner.errors import DiscoveryError
from llm_pruner.models.logits import find_logits


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits of a model's output, whatever it is wrapped in."""
    logits = find_logits(output)
    if logits is None:
        kind = type(output).__name__
        raise DiscoveryError(f"the model returns {kind}, in which no logits are found")
    return logits
