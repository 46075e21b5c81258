"""Sums of weight magnitudes: no data, no gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from llm_pruner.importance.needs import Need, Sums, parameters_by_name, reduce_term


def magnitude_sums(model: nn.Module, needs: Mapping[str, Need], name: str) -> dict[str, Sums]:
    """Return the sums of |w| (``l1``) or w^2 (``l2``; the root follows per unit)."""
    parameters = parameters_by_name(model)
    sums: dict[str, Sums] = {}
    with torch.no_grad():
        for tensor, need in needs.items():
            weight = parameters[tensor].detach()
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            sums[tensor] = reduce_term(weight.abs() if name == "l1" else weight.square(), need)
    return sums
