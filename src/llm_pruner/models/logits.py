"""The logits in what a language model returns."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from llm_pruner.errors import UserError

_STATES = re.compile("hidden|state|cache|key|attention|mem")


_needs_targets: WeakSet[nn.Module] = WeakSet()


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


def run_for_logits(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Run a model and return the logits of all positions, shape (samples, seq_len, vocabulary).

    A model that gives those of the last position alone gives all of them beside a loss, so it is
    given targets if it takes some.

    Raises:
        UserError: see ``logits_of``; or some positions have no logits.
    """
    if model in _needs_targets:
        logits = logits_of(model(input_ids, targets=input_ids))
    else:
        logits = logits_of(model(input_ids))
    if logits.shape[1] == input_ids.shape[1]:
        return logits
    if model in _needs_targets or "targets" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"the model returns logits for {logits.shape[1]} of {input_ids.shape[1]} positions, so "
            "it has no loss; let it return those of all positions"
        )
    _needs_targets.add(model)
    return run_for_logits(model, input_ids)
