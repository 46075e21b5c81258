"""Hidden states of a student beside those of its teacher, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llm_pruner.errors import UserError
from llm_pruner.recovery.forward import arguments_of
from llm_pruner.recovery.packing import Batch

_FLOOR = 1e-6


@dataclass(frozen=True)
class Kept:
    """What a student has of its teacher.

    Attributes:
        layers: numbers of the teacher's layers, in order; None for all of them.
        channels: numbers of its hidden channels; None for all of them.
    """

    layers: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None


@torch.no_grad()
def teacher_states(model: Any, batch: Batch) -> list[torch.Tensor]:
    """Return what enters each layer of a teacher, and what the last one's norm gives.

    Each has shape (learned tokens, hidden size) and holds the positions that predict them. The
    output embedding does not run.
    """
    output = model.base_model(**arguments_of(model, batch), output_hidden_states=True)
    return learned_states(output, batch)


def learned_states(output: Any, batch: Batch) -> list[torch.Tensor]:
    """Return the hidden states of an output at the positions that predict learned tokens.

    Raises:
        UserError: the model does not give its hidden states.
    """
    states: Sequence[torch.Tensor] | None = getattr(output, "hidden_states", None)
    if not states or any(one.shape[:-1] != batch.input_ids.shape for one in states):
        raise UserError(
            "a model does not give its hidden states, so they cannot be learned from; leave out "
            "--distill-hidden"
        )
    return [one[:, :-1][batch.learned[:, 1:].to(one.device)] for one in states]


def hidden_distance(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], kept: Kept
) -> torch.Tensor:
    """Return the sum over tokens of the mean over layers of |h - g|^2 / |g|^2.

    h is what enters one of the student's layers and g what enters the same layer of the teacher,
    in the hidden channels that the student has (mean squared error, as in arXiv 1909.10351 and
    2407.14679, of states whose scale differs between layers and tokens by orders of magnitude).
    The first layer, which reads embeddings, is left out, and so is what follows the last one, of
    which the logits speak.

    Args:
        student: what enters each of its layers, and one more; each (tokens, hidden size).
        teacher: the same of the teacher.
        kept: what they share.

    Raises:
        UserError: ``kept`` does not fit, or there is no second layer.
    """
    layers = kept.layers or tuple(range(len(teacher) - 1))
    size = len(kept.channels) if kept.channels else teacher[0].shape[-1]
    if len(layers) != len(student) - 1 or size != student[0].shape[-1]:
        raise UserError(
            f"the model has {len(student) - 1} layers of {student[0].shape[-1]} hidden channels, "
            f"the teacher {len(teacher) - 1} of {teacher[0].shape[-1]}, and no plan.json beside "
            "the model says which of them are left; leave out --distill-hidden"
        )
    if len(layers) < 2:
        raise UserError(
            "a model of one layer has no hidden states to compare; leave out --distill-hidden"
        )
    total = torch.zeros(len(student[0]), device=student[0].device)
    for own, number in zip(student[1:-1], layers[1:], strict=True):
        wanted = teacher[number].to(own.device).float()
        if kept.channels is not None:
            wanted = wanted[:, list(kept.channels)]
        apart = (own.float() - wanted).square().sum(-1)
        total = total + apart / wanted.square().sum(-1).clamp_min(_FLOOR)
    return total.sum() / (len(layers) - 1)
