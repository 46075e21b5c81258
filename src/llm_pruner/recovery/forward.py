"""Run a model on a batch, and find out whether it keeps packed samples apart."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from llm_pruner.recovery.batches import Batch, lay_out
from llm_pruner.sequences import TrainingSequence

TOLERANCE = 1e-4
"""Largest difference of logits, relative to their largest, that counts as rounding in float32."""

_LOGITS_BYTES = 256 * 2**20


def learned_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits that predict the learned tokens, float32 (n, vocabulary), and these tokens.

    The n tokens stand in the order of ``batch.parts``.
    """
    device = next(model.parameters()).device
    keywords: dict[str, Any] = {"use_cache": False}
    if batch.position_ids is not None:
        keywords["position_ids"] = batch.position_ids.to(device)
    if batch.attention_mask is not None:
        keywords["attention_mask"] = batch.attention_mask.to(device)
    tokens = batch.input_ids.to(device)
    logits = model(input_ids=tokens, **keywords).logits
    learned = batch.learned[:, 1:].to(logits.device)
    return logits[:, :-1][learned].float(), tokens.to(logits.device)[:, 1:][learned]


def can_pack(model: Any, vocabulary: int) -> bool:
    """Whether the model gives samples in one row the logits that each has alone.

    Tried on random tokens: transformers tells packed samples apart by their positions where the
    model builds its mask with the shared functions, and other models (learned positions by count,
    recurrences, code of their own) see one long text.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = inspect.signature(base.forward).parameters
    if "position_ids" not in names and not any(
        one.kind is inspect.Parameter.VAR_KEYWORD for one in names.values()
    ):
        return False
    random = np.random.default_rng(0)
    lengths = (5, 9, 7, 6)
    sequences = [
        TrainingSequence(random.integers(0, vocabulary, n), np.arange(n) > 0) for n in lengths
    ]
    everything = range(len(sequences))
    packed = lay_out(sequences, everything, packed=True, capacity=14, micro_tokens=28)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in packed:
                found, _ = learned_logits(model, batch)
                alone = [
                    learned_logits(model, one)[0]
                    for part in batch.parts
                    for one in lay_out(
                        sequences, [part.sample], packed=False, capacity=14, micro_tokens=14
                    )
                ]
                wanted = torch.cat(alone)
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
    """Return how many positions one forward pass may have: float32 logits of at most 256 MiB."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return max(seq_len, _LOGITS_BYTES // (4 * vocabulary))
