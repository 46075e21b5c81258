"""Cut a model, and make sure that what comes out, and what is saved, is its masked twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from llm_pruner.checkpoints.recipe import compose, from_edits
from llm_pruner.errors import VerificationError
from llm_pruner.pipeline.clock import Clock
from llm_pruner.pipeline.judge import sharing_copy
from llm_pruner.pipeline.loading import load
from llm_pruner.pipeline.settings import ModelSettings
from llm_pruner.surgery import prune_
from llm_pruner.types import Discovery, Edits, Removal
from llm_pruner.verification import (
    find_culprits,
    largest_difference,
    pruned_logits,
    require_equal,
    tolerance,
    twin_logits,
)


class Surgeon:
    """Cuts one model, once or in steps, and keeps what was changed since it was loaded."""

    def __init__(self, model: nn.Module, verify: bool, clock: Clock) -> None:
        self.model = model
        self.verify = verify
        self.clock = clock
        self.edits = Edits({}, {}, {}, {})
        self.difference: float | None = None

    def cut(self, discovery: Discovery, removal: Removal) -> None:
        """Prune in place; with ``verify``, compare with the masked twin."""
        expected = twin_logits(self.model, discovery, removal) if self.verify else None
        backup = self._weights() if self.verify else None
        edits = prune_(self.model, discovery, removal)
        total = compose(from_edits(self.edits), from_edits(edits))
        self.edits = Edits(total.shapes, total.buffers, total.attributes, total.layers)
        self.clock.stop("cut")
        if expected is not None:
            actual = pruned_logits(self.model, discovery)
            found = require_equal(
                expected, actual, lambda: self._culprits(discovery, removal, backup)
            )
            self.difference = max(self.difference or 0.0, found)
            self.clock.stop("verify")

    def has_biases(self, modules: Sequence[str]) -> None:
        """Note the biases that modules have now, whether or not they had one."""
        biases = {
            f"{name}.bias": tuple(self.model.get_submodule(name).get_parameter("bias").shape)
            for name in modules
        }
        self.edits = replace(self.edits, shapes={**self.edits.shapes, **biases})

    def _weights(self) -> Callable[[], nn.Module]:
        """Return how to get the model back as it is now.

        The copy shares the tensors, which surgery leaves as they are.
        """
        frozen = sharing_copy(self.model)
        return lambda: frozen

    def _culprits(
        self, discovery: Discovery, removal: Removal, backup: Callable[[], nn.Module] | None
    ) -> list[str]:
        return [] if backup is None else find_culprits(backup(), discovery, removal)


def reload_check(
    model: Any, discovery: Discovery, settings: ModelSettings
) -> Callable[[Path], None]:
    """Return a check that a saved folder gives the logits of the model in memory."""

    def check(folder: Path) -> None:
        expected = pruned_logits(model, discovery)
        saved = replace(settings, source=str(folder), revision=None)
        again = load(saved, tokenizer_required=False)
        actual = pruned_logits(again.model, discovery)
        difference = largest_difference(expected, actual)
        if difference > tolerance(expected):
            raise VerificationError(
                f"the saved folder gives logits that differ by {difference:.3g} from the model "
                "that was saved; nothing was kept; please report the model"
            )

    return check
