"""What a language model returns."""

from __future__ import annotations

from typing import Any

import torch

from llm_pruner.errors import DiscoveryError


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits of a model's output, whatever it is wrapped in."""
    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    if isinstance(output, tuple | list) and isinstance(output[0], torch.Tensor):
        return output[0]
    raise DiscoveryError(f"the model returns {type(output).__name__}, in which no logits are found")
