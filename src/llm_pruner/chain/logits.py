"""The logits in what a language model returns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from llm_pruner.errors import UserError

_STATES = re.compile("hidden|state|cache|key|attention|mem")


def find_logits(output: Any, depth: int = 3) -> torch.Tensor | None:
    """Return the logits of a model's output, or None.

    That is the output itself, what is called ``logits`` in it, or the first tensor of real numbers
    in a tuple, list, mapping or object that is no single number (a loss), nor by its name a state.

    Args:
        depth: how many of them may lie in each other.
    """
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() and output.dim() > 1 else None
    if isinstance(output, Mapping):
        parts = dict(output)
    elif hasattr(output, "_asdict"):
        parts = output._asdict()
    elif isinstance(output, tuple | list):
        parts = dict(enumerate(output))
    else:
        parts = dict(getattr(output, "__dict__", {}))
    rest = [part for name, part in parts.items() if not _STATES.search(str(name))]
    for part in [parts.get("logits", getattr(output, "logits", None)), *rest] if depth else ():
        found = find_logits(part, depth - 1)
        if found is not None:
            return found
    return None


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits of a model's output, shape (samples, seq_len, vocabulary).

    Raises:
        UserError: there are none, or they are no tensor of three dimensions.
    """
    logits = find_logits(output)
    if logits is None or logits.ndim != 3:
        raise UserError(
            f"the model returns {type(output).__name__} without logits of shape (samples, seq_len, "
            "vocabulary), so it has no loss; use a causal language model"
        )
    return logits
