"""Cut a model, and make sure that what comes out, and what is saved, is its masked twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from llm_pruner.checkpoints.reshape import compose, from_edits
from llm_pruner.models.loading import load
from llm_pruner.runtime.timer import Clock
from llm_pruner.settings.common import ModelSettings
from llm_pruner.surgery.cut import prune_
from llm_pruner.surgery.verify import (
    Verified,
    cut_verified_,
    require_same,
)
from llm_pruner.types import Discovery, Edits, Removal


class Surgeon:
    """Cuts one model, once or in steps, and keeps what was changed since it was loaded."""

    def __init__(self, model: nn.Module, verify: bool, clock: Clock) -> None:
        self.model = model
        self.verify = verify
        self.clock = clock
        self.edits = Edits({}, {}, {}, {})
        self.verified: Verified | None = None

    def cut(self, discovery: Discovery, removal: Removal) -> None:
        """Prune in place; with ``verify``, compare with the masked twin."""
        edits, verified = (
            cut_verified_(self.model, discovery, removal)
            if self.verify
            else (prune_(self.model, discovery, removal), None)
        )
        total = compose(from_edits(self.edits), from_edits(edits))
        self.edits = Edits(total.shapes, total.buffers, total.attributes, total.layers)
        self.clock.stop("cut" if verified is None else "verify")
        if verified is not None:
            before = self.verified
            worst = max(verified.difference, 0.0 if before is None else before.difference)
            self.verified = replace(verified, difference=worst)

    def has_biases(self, modules: Sequence[str]) -> None:
        """Note the biases that modules have now, whether or not they had one."""
        biases = {
            f"{name}.bias": tuple(self.model.get_submodule(name).get_parameter("bias").shape)
            for name in modules
        }
        self.edits = replace(self.edits, shapes={**self.edits.shapes, **biases})


def reload_check(
    model: Any, discovery: Discovery, settings: ModelSettings, clock: Clock
) -> Callable[[Path], None]:
    """Return a check that a saved folder gives the logits of the model in memory."""

    def check(folder: Path) -> None:
        clock.stop("save")
        saved = replace(settings, source=str(folder), revision=None)
        again = load(saved, tokenizer_required=False)
        require_same(model, again.model, discovery)
        clock.stop("reload")

    return check
