"""The logits in what a language model returns."""

from __future__ import annotations

from typing import Any

import torch

from llm_pruner.errors import UserError


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits of a model's output: ``.logits``, the first entry, or the output itself.

    Raises:
        UserError: none of these is a tensor of three dimensions.
    """
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
        raise UserError(
            f"the model returns {type(output).__name__} without logits of shape (samples, seq_len, "
            "vocabulary), so it has no loss; use a causal language model"
        )
    return logits
