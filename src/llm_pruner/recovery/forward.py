"""Run a model on a batch, and find out whether it keeps packed samples apart."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from llm_pruner.data.sequences import TrainingSequence
from llm_pruner.models.forward import embedding_rows, parameters_of
from llm_pruner.recovery.packing import Batch, lay_out

TOLERANCE = 1e-4
"""Largest difference of logits, relative to their largest, that counts as rounding in float32."""

_LOGITS_BYTES = 256 * 2**20
_POSITIONS = 2048


def target_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a model, which may be wrapped for several processes.

    Returns:
        The logits that predict the target tokens, float32 (n, vocabulary), and these tokens, (n,),
        in the order of ``Batch.parts``.
    """
    logits = model(**arguments_of(model, batch)).logits[:, :-1]
    logits = logits[batch.learned[:, 1:].to(logits.device)].float()
    return logits, target_tokens(batch).to(logits.device)


def target_tokens(batch: Batch) -> torch.Tensor:
    """Return the tokens that a batch teaches, int64 (n,), in the order of ``Batch.parts``."""
    return batch.input_ids[:, 1:][batch.learned[:, 1:]]


def arguments_of(model: Any, batch: Batch) -> dict[str, Any]:
    """Return the arguments that a model takes a batch in, on its device."""
    device = next(model.parameters()).device
    keywords: dict[str, Any] = {"input_ids": batch.input_ids.to(device), "use_cache": False}
    if batch.position_ids is not None:
        keywords["position_ids"] = batch.position_ids.to(device)
    if batch.attention_mask is not None:
        keywords["attention_mask"] = batch.attention_mask.to(device)
    return keywords


def can_pack(model: Any, vocabulary: int) -> bool:
    """Whether the model gives samples in one row the logits that each has alone.

    Tried on random tokens: transformers tells packed samples apart by their positions where the
    model builds its mask with the shared functions, and other models (learned positions by count,
    recurrences, code of their own) see one long text.
    """
    names = parameters_of(model)
    takes_positions = "position_ids" in names or any(
        one.kind is inspect.Parameter.VAR_KEYWORD for one in names.values()
    )
    random = np.random.default_rng(0)
    lengths = (5, 9, 7, 6)
    sequences = [
        TrainingSequence(random.integers(0, vocabulary, n), np.arange(n) > 0) for n in lengths
    ]
    layout = {"capacity": 14, "micro_tokens": 28}
    everything = range(len(sequences))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = [
                target_logits(model, lay_out(sequences, [number], packed=False, **layout)[0])[0]
                for number in everything
            ]
            if not takes_positions:
                return False
            for batch in lay_out(sequences, everything, packed=True, **layout):
                found, _ = target_logits(model, batch)
                wanted = torch.cat([alone[part.sample] for part in batch.parts])
                scale = max(float(wanted.abs().max()), 1e-6)
                # Half precision rounds more; a leak changes logits by far more than either.
                half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
                if not float((found - wanted).abs().max()) <= (50 if half else 1) * (
                    TOLERANCE * scale
                ):
                    return False
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False  # whatever a model says to positions that start again, it does not take them
    finally:
        model.train(training)
    return True


def micro_tokens(model: Any, seq_len: int) -> int:
    """Return how many positions one forward pass may have: float32 logits of at most 256 MiB.

    On a CPU, where logits are made a few at a time, 2,048.
    """
    if next(model.parameters()).device.type == "cpu":
        return max(seq_len, _POSITIONS)
    vocabulary = embedding_rows(model)
    return max(seq_len, _LOGITS_BYTES // (4 * vocabulary))
