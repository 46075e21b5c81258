"""How far a model's logits are from the dense model's, on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llm_pruner.models.forward import run_for_logits, undisturbed
from llm_pruner.models.streaming import is_model_streamed
from llm_pruner.models.synchronized_runs import in_step, result_of, runs_in_step
from llm_pruner.runtime.progress import track

Change: TypeAlias = Callable[[nn.Module, int], AbstractContextManager[None]]
"""Inside what it returns, a model is another one, for the part of a number of held-out text."""

TOGETHER = 512
"""Tokens in one run at most, unless a sample is longer. Of few, a processor waits for weights."""

_LEAST = torch.finfo(torch.float16).min
"""Log-probability that is taken for that of a token which is never written."""

_ROWS = 64
"""Tokens whose logits are compared at a time."""


def divergences(
    dense: nn.Module, networks: Sequence[nn.Module], held_out: torch.Tensor
) -> list[float]:
    """Return each network's mean KL(dense || network) in nats, by parts if weights stay."""
    totals = [0.0] * len(networks)
    for ids in (held_out,) if is_model_streamed(dense) else in_parts(held_out):
        meter = DivergenceMeter(dense, ids)
        found = [meter.of(one) * len(ids) for one in networks]
        totals = [total + one for total, one in zip(totals, found, strict=True)]
    return [total / len(held_out) for total in totals]


def in_parts(held_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return token ids (samples, seq_len) as those of one run each."""
    return held_out.split(max(1, TOGETHER // held_out.shape[1]))


class DivergenceMeter:
    """Measures how far models diverge from a dense one on ``held_out``, (samples, seq_len)."""

    def __init__(self, model: nn.Module, held_out: torch.Tensor) -> None:
        self._ids = held_out.to(next(model.parameters()).device, torch.long)
        jobs = [partial(_log_probabilities, ids) for ids in in_parts(self._ids)]
        with undisturbed(model):
            self._dense = [*map(result_of, in_step(model, jobs, "dense logits"))]

    def of(self, network: nn.Module) -> float:
        """Return the mean over tokens of KL(dense || network) in nats."""
        pairs = zip(in_parts(self._ids), self._dense, strict=True)
        jobs = [partial(_divergence, *pair) for pair in pairs]
        with undisturbed(network):
            total = sum(map(result_of, in_step(network, jobs, "divergence")))
        return total / self._ids.numel()

    def of_each(self, network: nn.Module, changes: Sequence[Change], label: str) -> list[float]:
        """Return the mean over tokens of KL(dense || network) in nats for each of some changes."""
        parts = list(enumerate(zip(in_parts(self._ids), self._dense, strict=True)))
        jobs = [partial(_divergence_after, one, n, *of) for one in changes for n, of in parts]
        found: list[float] = []
        with undisturbed(network):
            if is_model_streamed(network):
                count = runs_in_step(network, parts[0][1][0].numel())
                for at in range(0, len(jobs), count):
                    found += map(result_of, in_step(network, jobs[at : at + count], label))
            else:
                outcomes = in_step(network, jobs, label)
                found += map(result_of, track(outcomes, label, len(jobs)))
        sums = np.reshape(found, (len(changes), len(parts))).sum(1)
        return [float(one) for one in sums / self._ids.numel()]


@torch.no_grad()
def _log_probabilities(ids: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Return those of a part, (tokens, vocabulary), on the CPU, float16, which loses little."""
    logits = run_for_logits(model, ids).flatten(0, 1)
    found = torch.empty(logits.shape, dtype=torch.float16, device="cpu")
    for rows, values in zip(found.split(_ROWS), logits.split(_ROWS), strict=True):
        rows.copy_(values.float().log_softmax(-1).clamp_min(_LEAST))
    return found


def _divergence_after(
    change: Change, part: int, ids: torch.Tensor, dense: torch.Tensor, network: nn.Module
) -> float:
    with change(network, part):
        return _divergence(ids, dense, network)


@torch.no_grad()
def _divergence(ids: torch.Tensor, dense: torch.Tensor, network: nn.Module) -> float:
    logits, sums = run_for_logits(network, ids).flatten(0, 1), []
    for rows, known in zip(logits.split(_ROWS), dense.split(_ROWS), strict=True):
        after = rows.float().log_softmax(-1).clamp_min(_LEAST)
        before = known.to(rows.device).float()
        sums.append(F.kl_div(after, before, log_target=True, reduction="sum"))
    return sum(map(float, sums))  # a GPU is waited for once
