"""Score held-out samples: by what training minimizes, and by what each source says next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from llm_pruner.data.sequences import TrainingSequence
from llm_pruner.models.forward import evaluating
from llm_pruner.recovery.chunked_loss import summed_loss
from llm_pruner.recovery.objective import Guide, LossAndGradient
from llm_pruner.recovery.packing import Batch, target_logits, target_tokens
from llm_pruner.runtime.processes import ALONE, Processes
from llm_pruner.runtime.progress import track


@dataclass
class Evaluation:
    """A score of the held-out samples.

    Attributes:
        step: optimizer steps before it.
        loss: mean over all learned tokens of what training minimizes, in nats: the negative
            log-likelihood, or its mixture with the distance to the teacher. The text that a sample
            happens to hold is one draw of what could follow; a teacher gives the odds of every
            token, so that a small gain shows on a few samples.
        by_source: mean negative log-likelihood of each source; None where nothing is held out of
            it.
    """

    step: int
    loss: float
    by_source: list[float | None]


@torch.no_grad()
def score(
    model: Any,
    step: int,
    batches: Sequence[Batch],
    sequences: Sequence[TrainingSequence],
    sources: int,
    teacher: Guide | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Return the score of a model in eval mode, over the batches of all processes.

    The batches are of ``sequences``, held out of so many ``sources``, as is ``teacher``.
    """
    label = f"held-out text, {f'step {step}' if step else 'before training'}"
    sums = torch.zeros(sources, dtype=torch.float64, device="cpu")
    counts = [0] * sources
    mixed = 0.0
    with evaluating(model):
        for batch in track(processes.share(batches), label):
            if batch is None:
                if processes.sharded:
                    target_logits(model, batches[0])
                continue
            each, total = _losses(model, batch, teacher)
            mixed += total
            own = [sequences[sample] for sample in batch.samples]
            for one, found in zip(own, each.split([one.targets for one in own]), strict=True):
                sums[one.source] += found.sum()
                counts[one.source] += one.targets
    mixed, *both = processes.sums([mixed, *sums.tolist(), *counts])
    losses, tokens_of = both[:sources], both[sources:]
    total = sum(losses) if teacher is None else mixed
    by_source = [loss / n if n else None for loss, n in zip(losses, tokens_of, strict=True)]
    return Evaluation(step, total / sum(tokens_of), by_source)


def _losses(model: Any, batch: Batch, teacher: Guide | None) -> tuple[torch.Tensor, float]:
    """Return the negative log-likelihood of each learned token, and the sum that is minimized."""
    found: list[torch.Tensor] = []
    tokens = target_tokens(batch)
    mixture = None if teacher is None else teacher.objective(batch)

    def objective(logits: torch.Tensor, span: slice) -> LossAndGradient:
        each = F.cross_entropy(logits, tokens[span].to(logits.device), reduction="none")
        found.append(each.double().cpu())
        return (each.sum(), None) if mixture is None else mixture(logits, span)

    total = float(summed_loss(model, batch, objective))
    return torch.cat(found), total
