"""Taylor sums from a plain backward pass through the whole model.

Holds the gradients of every scored parameter at once; works for any module.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from llm_pruner.importance.criterion import Criterion
from llm_pruner.importance.gradients import GradientSums, batches, pull_back
from llm_pruner.importance.loss import loss_cotangent
from llm_pruner.importance.needs import Need, Sums, parameters_by_name
from llm_pruner.models.logits import run_for_logits
from llm_pruner.runtime.progress import track

_TOKENS = 1024


def whole_sums(
    model: nn.Module, input_ids: torch.Tensor, criterion: Criterion, needs: Mapping[str, Need]
) -> dict[str, Sums]:
    """Return the criterion's sums for every tensor of ``needs``.

    Args:
        model: with no parameter that requires a gradient.
        input_ids: shape (samples, seq_len), on the model's device.
        criterion: a taylor criterion.
        needs: tensor -> sums wanted.

    Raises:
        UserError: see ``score``.
    """
    known = parameters_by_name(model)
    parameters = {name: known[name] for name in needs}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    samples, length = input_ids.shape
    size = max(1, _TOKENS // length) if criterion.order == "first" else 1
    gradients = GradientSums(parameters, criterion)
    for part in track(batches(samples, size), "importance"):
        ids = input_ids[part]
        logits = run_for_logits(model, ids)
        cotangent = loss_cotangent(logits, ids, part.start)
        gradients.add(*pull_back([logits], list(parameters.values()), [cotangent], part))
    return gradients.sums(needs, samples)
