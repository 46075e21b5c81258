"""``round_to`` chosen by what this machine multiplies fast."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from llm_pruner.evaluation.rounding import CANDIDATES, Product, Rounding, fast_multiple
from llm_pruner.planning import Selection, choose_groups
from llm_pruner.planning.candidates import CHANNELS
from llm_pruner.planning.target import Scope
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.types import Discovery, Group

LEEWAY = 0.005
"""Share of all parameters by which a pruned model may miss its target."""

_FINEST = 4
"""Sizes, at least, that a multiple must leave a group to choose from."""
_MOST_PRODUCTS = 4


def measured_rounding(model: nn.Module, discovery: Discovery, selection: Selection) -> Rounding:
    """Time the products of the channels that may be pruned, on the device of the model.

    Candidates that leave the smallest group fewer than four sizes are left out, and those that
    are too coarse to reach a number of parameters within half a point; where the ranking is
    local, all layers take a step together.

    Raises:
        UserError: nothing can be pruned.
    """
    chosen = choose_groups(discovery, selection)
    groups = [group for group in chosen if group.kind in CHANNELS]
    candidates = [m for m in CANDIDATES if m <= _largest(discovery, groups, selection.scope)]
    weight = next(model.parameters())
    # Without weights (on meta) the processor stands in.
    device = torch.device("cpu") if weight.is_meta else weight.device
    products = _products(model, discovery, groups)
    return fast_multiple(products, candidates, dtype=weight.dtype, device=device)


def _largest(discovery: Discovery, groups: Sequence[Group], scope: Scope) -> float:
    """Return the largest multiple that leaves enough sizes."""
    if not groups:
        return 0
    total = count_parameters(discovery)
    steps = []
    for kind in {group.kind for group in groups}:
        same = [group for group in groups if group.kind == kind]
        moving = same if scope == "local" else same[:1]
        one = {group.name: np.zeros(1, np.int64) for group in moving}
        steps.append(total - count_parameters(discovery, one))
    # Rounding is off by half a multiple at most; the finest kind makes up for the others.
    fine = 2 * LEEWAY * total / max(1, min(steps))
    return min(fine, min(group.size for group in groups) / _FINEST)


def _products(model: Any, discovery: Discovery, groups: Sequence[Group]) -> list[Product]:
    """Return the distinct products that the groups' members shrink, the heaviest first."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    found: Counter[Product] = Counter()
    for group in groups:
        for member in group.members:
            shape = () if member.buffer else discovery.shapes[member.tensor]
            path = member.tensor.rpartition(".")[0]
            # Of the weights of all experts, shape (experts, ...), one matrix is multiplied.
            dim = member.dim - (len(shape) - 2)
            if len(shape) not in (2, 3) or dim < 0:
                continue
            owner = model.get_submodule(path)
            # The embeddings are no blocks of a layer, and a look-up is no product.
            if id(owner) in ends or isinstance(owner, nn.Embedding):
                continue
            linear = isinstance(owner, nn.Linear) or len(shape) == 3
            positions = member.index.shape[1]
            rows, columns = shape[-2:]
            product = Product(rows, columns, dim, group.size, positions, linear)
            found[product] += math.prod(shape)
    return [product for product, _ in found.most_common(_MOST_PRODUCTS)]
