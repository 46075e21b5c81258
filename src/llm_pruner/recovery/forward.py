"""Run a model on a batch, and find out whether it keeps packed samples apart."""

from __future__ import annotations

import inspect
from typing import Any, cast
from weakref import WeakSet

import numpy as np
import torch

from llm_pruner.recovery.batches import Batch, lay_out
from llm_pruner.sequences import TrainingSequence

TOLERANCE = 1e-4
"""Largest difference of logits, relative to their largest, that counts as rounding in float32."""

_LOGITS_BYTES = 256 * 2**20


def learned_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits that predict the learned tokens, float32 (n, vocabulary), and these tokens.

    The n tokens stand in the order of ``batch.parts``. Where the model lets it, the output
    embedding runs on their positions alone: logits of a row are by far its largest tensors.
    """
    device = next(model.parameters()).device
    keywords: dict[str, Any] = {"use_cache": False}
    if batch.position_ids is not None:
        keywords["position_ids"] = batch.position_ids.to(device)
    if batch.attention_mask is not None:
        keywords["attention_mask"] = batch.attention_mask.to(device)
    tokens = batch.input_ids.to(device)
    learned = batch.learned[:, 1:]
    logits = _narrow_logits(model, tokens, keywords, learned)
    if logits is None:
        whole = model(input_ids=tokens, **keywords).logits
        logits = whole[:, :-1][learned.to(whole.device)]
    return logits.float(), tokens.to(logits.device)[:, 1:][learned.to(logits.device)]


_whole: WeakSet[torch.nn.Module] = WeakSet()
"""Output embeddings whose models need the logits of all positions."""


def _narrow_logits(
    model: Any, tokens: torch.Tensor, keywords: dict[str, Any], learned: torch.Tensor
) -> torch.Tensor | None:
    """Return (n, vocabulary) from an output embedding that is given n positions; None if it cannot.

    Args:
        model: may be wrapped for several processes.
        tokens: shape (rows, length).
        keywords: the other arguments.
        learned: bool (rows, length - 1), which positions, counted without each row's first token.
    """
    head = getattr(model, "module", model).get_output_embeddings()
    rows, length = tokens.shape
    # A hidden state of (length, rows, features) would look alike.
    if head is None or head in _whole or rows == length:
        return None
    count = int(learned.sum())

    def pick(_: Any, args: tuple[Any, ...]) -> Any:
        hidden = args[0] if args else None
        if isinstance(hidden, torch.Tensor) and hidden.shape[:-1] == (rows, length):
            return (hidden[:, :-1][learned.to(hidden.device)][None], *args[1:])
        return None

    handle = head.register_forward_pre_hook(pick)
    try:
        logits = model(input_ids=tokens, **keywords).logits
    except (RuntimeError, ValueError, IndexError):
        logits = None  # if the shape was not the reason, the whole model says so again
    finally:
        handle.remove()
    if logits is None or logits.shape[:-1] != (1, count):
        _whole.add(head)
        return None
    return cast("torch.Tensor", logits[0])


def can_pack(model: Any, vocabulary: int) -> bool:
    """Whether the model gives samples in one row the logits that each has alone.

    Tried on random tokens: transformers tells packed samples apart by their positions where the
    model builds its mask with the shared functions, and other models (learned positions by count,
    recurrences, code of their own) see one long text.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = inspect.signature(base.forward).parameters
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
                learned_logits(model, lay_out(sequences, [number], packed=False, **layout)[0])[0]
                for number in everything
            ]
            if not takes_positions:
                return False
            for batch in lay_out(sequences, everything, packed=True, **layout):
                found, _ = learned_logits(model, batch)
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
    """Return how many positions one forward pass may have: float32 logits of at most 256 MiB."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return max(seq_len, _LOGITS_BYTES // (4 * vocabulary))
