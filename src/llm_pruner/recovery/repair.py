"""Train a pruned model to say what the dense one says: no labels, and no more than some minutes.

The loss is KL(dense || pruned) over the whole vocabulary, at every token of plain text (arXiv
1503.02531). All weights of the blocks are trained where the memory holds their
gradients and what AdamW keeps of them, else adapters (LoRA), which are merged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_pruner.data.sequences import TrainingSequence, make_sequence
from llm_pruner.models.forward import undisturbed
from llm_pruner.models.layers import own_copy
from llm_pruner.recovery.callbacks import Progress
from llm_pruner.recovery.distill import DirectTeacher
from llm_pruner.recovery.run import Outcome, recover_
from llm_pruner.runtime.memory import free_bytes
from llm_pruner.runtime.precision import multiplies_bfloat16
from llm_pruner.runtime.progress import track
from llm_pruner.settings.recover import TrainingSettings

STEP = 2048
"""Tokens of a step."""

EPOCHS = 100
"""Passes over the text at most; the time ends a run before."""

EVALUATIONS = 4
"""Times that the held-out text is scored on the way."""

RATES = {"blocks": 1e-4, "lora": 1e-3}
"""Learning rate of each method, at its peak: in the few steps of some minutes AdamW at twice the
rate of ``blocks`` moves weights more by chance than by what it learned."""

TRAINED_BYTES = 28
"""Memory that a trained weight takes: itself and what it was, its gradient, two moments, the best
one so far and the first one, all float32."""


def repair_(
    model: Any,
    dense: Any,
    input_ids: torch.Tensor,
    held_out: torch.Tensor,
    *,
    minutes: float,
    seed: int,
    as_saved_: Callable[[Any], None] = lambda _: None,
) -> Outcome:
    """Train ``model`` for some minutes; it has its weights back if ``held_out`` says so.

    Args:
        model: the pruned model; may share weights with ``dense``.
        dense: the model before the removal; left as it was.
        input_ids: text to train on, (samples, seq_len).
        held_out: text that decides which weights are kept, (samples, seq_len); not trained on.
        minutes: of training, with all scores on the way.
        seed: of the order of the text.
        as_saved_: as for ``recover_``.

    Raises:
        UserError: as ``recover_``.
    """
    trained, length = _own_copy(model), input_ids.shape[1]
    train, judged = _sequences(input_ids), _sequences(held_out)
    bar, shown = track(range(int(60 * minutes)), "repair, seconds"), 0

    def say(progress: Progress) -> None:
        nonlocal shown
        while shown < progress.run.seconds and next(bar, None) is not None:
            shown += 1

    with (
        undisturbed(dense),
        undisturbed(model),
        closing(bar),
        tempfile.TemporaryDirectory() as folder,
    ):
        found, outcome = recover_(
            trained,
            train,
            judged,
            _settings(trained, length, minutes, seed),
            work=Path(folder),
            keeps=False,
            teacher=DirectTeacher(dense),
            judge=DirectTeacher(dense),
            say=say,
            as_saved_=as_saved_,
        )
    if outcome.gained:
        _take_(model, found)
    return outcome


def _settings(model: Any, length: int, minutes: float, seed: int) -> TrainingSettings:
    full, method = model.dtype == torch.float32, method_for(model)
    return TrainingSettings(
        method=method,
        learning_rate=RATES[method],
        batch_size=max(1, STEP // length),
        seq_len=length,
        epochs=EPOCHS,
        max_minutes=minutes,
        evaluations=EVALUATIONS,
        patience=EVALUATIONS,
        seed=seed,
        trainer={
            "adam_beta2": 0.95,
            "bf16": full and multiplies_bfloat16(next(model.parameters()).device.type),
        },
    )


def _take_(model: nn.Module, trained: nn.Module) -> None:
    """Give a model the weights of a trained copy."""
    taken: dict[int, nn.Parameter] = {}  # one for all modules that share a weight
    for name, weight in trained.named_parameters(remove_duplicate=False):
        owner, _, key = name.rpartition(".")
        weights = model.get_submodule(owner)._parameters
        old = weights[key]
        if old is not None and weight is not old:
            new = nn.Parameter(weight.detach(), requires_grad=old.requires_grad)
            weights[key] = taken.setdefault(id(weight), new)


def _own_copy(model: Any) -> Any:
    """Return a copy with weights of its own, but for the embeddings, which are not trained."""
    shared = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [weight for one in shared if one is not None for weight in one.parameters()]
    return own_copy(model, {id(weight): weight for weight in weights})


def method_for(model: nn.Module) -> str:
    """Return the recovery method that the free memory of the model's device has room for."""
    weights = [*model.parameters()]
    count = sum(one.numel() for one in weights)
    if any(one.dtype != torch.float32 for one in weights):
        return "lora"
    free = free_bytes(str(weights[0].device))
    return "blocks" if TRAINED_BYTES * count < free else "lora"


def _sequences(input_ids: torch.Tensor) -> list[TrainingSequence]:
    return [make_sequence(row, [True] * len(row), 0) for row in input_ids.tolist()]
