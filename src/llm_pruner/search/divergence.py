"""How far a model's logits are from the dense model's, on held-out text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from llm_pruner.models.forward import run_for_logits, undisturbed

_ROWS = 64
"""Tokens whose logits are compared at a time."""


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return float16 on the CPU, shape (tokens, vocabulary) as the logits."""
    found = torch.empty(logits.shape, dtype=torch.float16)
    for rows, values in zip(found.split(_ROWS), logits.split(_ROWS), strict=True):
        rows.copy_(values.float().log_softmax(-1))
    return found


def divergences(
    dense: nn.Module, networks: Sequence[nn.Module], held_out: torch.Tensor
) -> list[float]:
    """Return for each network the mean over tokens of KL(dense || network) in nats.

    The logits of one sample at a time are held.
    """
    totals = [0.0] * len(networks)
    for ids in held_out.split(1):
        meter = DivergenceMeter(dense, ids)
        totals = [total + meter.of(one) for total, one in zip(totals, networks, strict=True)]
    return [total / len(held_out) for total in totals]


class DivergenceMeter:
    """Measures the divergence of models from a dense one.

    Args:
        model: the dense model; left as it was.
        held_out: token ids, shape (samples, seq_len), on which the logits are compared.
    """

    def __init__(self, model: nn.Module, held_out: torch.Tensor) -> None:
        self._ids = held_out.to(next(model.parameters()).device, torch.long)
        with undisturbed(model), torch.no_grad():
            # Half the memory of float32; what is lost is far below any damage of interest.
            self._dense = [
                _log_probabilities(run_for_logits(model, ids)[0]) for ids in self._ids.split(1)
            ]

    def of(self, network: nn.Module) -> float:
        """Return the mean over tokens of KL(dense || network) in nats."""
        total = 0.0
        with undisturbed(network), torch.no_grad():
            for ids, dense in zip(self._ids.split(1), self._dense, strict=True):
                logits = run_for_logits(network, ids)[0]
                for start in range(0, len(logits), _ROWS):
                    rows = slice(start, start + _ROWS)
                    after = logits[rows].float().log_softmax(-1).cpu()
                    before = dense[rows].float()
                    total += float(F.kl_div(after, before, log_target=True, reduction="sum"))
        return total / self._ids.numel()
