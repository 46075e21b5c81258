"""Cut a model, and make sure that what comes out, and what is saved, is its masked twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from llm_pruner.checkpoints.recipe import compose
from llm_pruner.models.load import load
from llm_pruner.runtime.progress import Clock
from llm_pruner.settings.common import ModelSettings
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.verify import Verified, cut_verified_, require_same
from llm_pruner.types import Discovery, Edits, Removal


class Surgeon:
    """Cuts one model, once or in steps, and keeps what was changed since it was loaded."""

    def __init__(self, model: nn.Module, verify: bool, clock: Clock) -> None:
        self.model = model
        self.verify = verify
        self.clock = clock
        self.edits = Edits()
        self.verified: Verified | None = None
        self.discovery: Discovery | None = None

    def cut(self, discovery: Discovery, removal: Removal) -> None:
        """Prune in place; with ``verify``, compare with the masked twin."""
        if self.verify:
            edits, verified = cut_verified_(self.model, discovery, removal)
            before = 0.0 if self.verified is None else self.verified.difference
            self.verified = replace(verified, difference=max(verified.difference, before))
        else:
            edits = cut_(self.model, discovery, removal)
        self.edits = compose(self.edits, edits)
        self.discovery = discovery
        self.clock.stop("verify" if self.verify else "cut")

    def reload_check(
        self, discovery: Discovery, settings: ModelSettings, memory: int
    ) -> Callable[[Path], None]:
        """Return a check that a saved folder gives the logits of the model in memory."""

        def check(folder: Path) -> None:
            self.clock.stop("save")
            again = load(settings.loading(folder), tokenizer_required=False, memory=memory)
            # In the scenes of the last cut: those of a smaller model have other lengths.
            require_same(self.model, again.model, self.discovery or discovery, self.verified)
            self.clock.stop("reload")

        return check
