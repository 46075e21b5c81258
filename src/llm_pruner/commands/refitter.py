"""Bring a pruned model nearer to the dense one, where held-out text says that it is a gain."""

from __future__ import annotations

from dataclasses import replace

import torch

from llm_pruner.compensation import Refitted, refit_
from llm_pruner.models.layers import sharing_copy
from llm_pruner.models.load import LoadedModel
from llm_pruner.runtime.memory import give_back
from llm_pruner.runtime.precision import mixed_precision
from llm_pruner.search.divergence import divergences
from llm_pruner.search.structure_split import hold_out
from llm_pruner.surgery.pruner import Surgeon
from llm_pruner.types import Discovery, Removal

TOKENS = 1024
"""Held-out tokens that all refits together are judged on."""


class Refitter:
    """Brings the pruned model nearer to the dense one after each cut, if that is a gain.

    Each consumer is judged by its own error on held-out tokens, and all of them together by the
    divergence from the dense model on samples that no fit has seen: if the repaired model is
    further from the dense one than it was, it gets its weights back.
    """

    def __init__(self, loaded: LoadedModel, discovery: Discovery, surgeon: Surgeon) -> None:
        self._model, self._dense = loaded.model, sharing_copy(loaded.model)
        self._discovery, self._surgeon = discovery, surgeon
        self.done: list[Refitted] = []

    def refit(self, removal: Removal, tokens: torch.Tensor) -> None:
        """Refit after ``removal``, all that was removed so far in dense numbering."""
        before = sharing_copy(self._model)
        # Two samples are the least that can be fitted; then one of them has to judge, too.
        held_out, fitted = hold_out(tokens) if len(tokens) > 2 else (tokens[-1:], tokens)
        with mixed_precision():
            found = refit_(self._model, self._dense, self._discovery, removal, fitted)
        give_back()
        judging = held_out[: max(1, TOKENS // held_out.shape[1])]
        after, without = divergences(self._dense, (self._model, before), judging)
        if not after <= without:
            for one in found:
                module = self._model.get_submodule(one.module)
                module.weight = before.get_submodule(one.module).get_parameter("weight")
            found = [replace(one, ridge=None, after=one.before) for one in found]
        self.done.extend(found)
        self._surgeon.clock.stop("least squares")
