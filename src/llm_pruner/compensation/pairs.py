"""Consumers of what was removed, in the pruned model and in the dense one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from llm_pruner.models.consumers import consumers_of, input_dim, weight_of
from llm_pruner.models.layers import Renaming, kept_layers
from llm_pruner.surgery.removal import removed_modules, removed_positions
from llm_pruner.types import Discovery, Removal

KINDS = ("heads", "query_heads", "value_dim", "ffn")
"""Kinds of groups whose consumers are repaired."""


@dataclass(frozen=True)
class Refitted:
    """What became of one consumer.

    Attributes:
        module: qualified name in the pruned model.
        ridge: the one that was chosen; None if the weight was left as it was.
        before: squared error over the squared norm of the target, on held-out tokens.
        after: the same after the refit; never larger.
    """

    module: str
    ridge: float | None
    before: float
    after: float

    @property
    def changed(self) -> bool:
        """Whether it is not as the cut left it."""
        return self.ridge is not None


@dataclass(frozen=True)
class Pair:
    """A consumer in the pruned model and the same in the dense one.

    Attributes:
        name: qualified name in the pruned model.
        module, dense: the two.
        out: output features of the dense module that the pruned one has.
        fitted: whether least squares fits it: where it lost inputs, and everywhere if layers or
            hidden channels went.
    """

    name: str
    module: nn.Module
    dense: nn.Module
    out: torch.Tensor
    fitted: bool


def pairs_of(
    model: nn.Module, dense: nn.Module, discovery: Discovery, removal: Removal
) -> dict[int, Pair]:
    """Return id of the dense module -> pair, for the consumers that are left.

    Args:
        model: the pruned model.
        dense: the model before the removal.
        discovery: of the dense model.
        removal: what was removed, in its numbering.
    """
    removed = removed_positions(discovery, removal)
    rename = Renaming(kept_layers(dense, removed_modules(discovery, removal)))
    pairs: dict[int, Pair] = {}
    everywhere = any(group.kind not in KINDS for group in discovery.groups if group.name in removal)
    tied = set(discovery.aliases) | set(discovery.aliases.values())
    nothing = np.zeros(0, dtype=np.int64)
    for group in discovery.groups:
        if group.kind not in KINDS:
            continue
        for consumer in consumers_of(dense, group):
            weight, name = f"{consumer.module}.weight", rename(consumer.module)
            if name is None or weight in tied:
                continue
            before = dense.get_submodule(consumer.module)
            inputs = input_dim(before) or 0
            lost = removed.get((weight, inputs), nothing)
            rows = np.arange(weight_of(before).shape[0])
            kept = torch.from_numpy(np.delete(rows, removed.get((weight, 1 - inputs), nothing)))
            fitted = everywhere or len(lost) > 0
            pairs[id(before)] = Pair(name, model.get_submodule(name), before, kept, fitted)
    return pairs
