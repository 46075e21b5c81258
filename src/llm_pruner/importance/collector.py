"""What takes the gradients of a backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import nn

from llm_pruner.importance.loss import pull_back
from llm_pruner.models.activation_store import HiddenStates

Seen: TypeAlias = tuple[str, torch.Tensor, torch.Tensor | None]
"""A module, what it was given or has returned, and the gradient of that."""


class Collector:
    """Takes the gradients of a backward pass as it comes to them."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        together: bool,
        label: str,
        modules: Iterable[int] = (),
        keep: HiddenStates | None = None,
    ) -> None:
        self.parameters, self.together, self.label = dict(parameters), together, label
        self.modules = frozenset(modules)
        self.keep = keep

    light = False

    def seen(self) -> list[tuple[str, torch.Tensor]]:
        """Return (module, tensor) noted since the last call; each gets a gradient."""
        return []

    def add_seen(self, part: slice, seen: Iterable[Seen], factor: float) -> None:
        """Take the gradients of what `seen` returned, which are to be multiplied by ``factor``."""

    def add_weight(self, name: str, part: slice, gradient: torch.Tensor, factor: float) -> None:
        """Take the gradient of a parameter, summed over the samples of ``part``."""

    def passed(
        self,
        block: int,
        part: slice,
        hidden: torch.Tensor,
        output: torch.Tensor,
        gradient: torch.Tensor,
    ) -> None:
        """See a block's input and output, and the gradient at its output."""

    def add_up(self, block: int | None, names: Iterable[str], batch: slice) -> None:
        """Add what a batch gave to what those before it gave."""

    def finished(self, block: int | None, names: Iterable[str]) -> None:
        """Note that a block, or what is outside of all blocks (None), and ``names`` are done."""

    def pull(
        self,
        outputs: Sequence[torch.Tensor],
        cotangents: Sequence[tuple[torch.Tensor, float]],
        part: slice,
        names: Iterable[str],
        hidden: torch.Tensor | None = None,
        seen: Sequence[tuple[str, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor | None, float]:
        """Pull a gradient back to all that is wanted; return that of ``hidden`` and its factor."""
        seen, names = self.seen() if seen is None else seen, list(names)
        inputs = [tensor for _, tensor in seen] + [self.parameters[name] for name in names]
        if hidden is not None:
            inputs.append(hidden)
        if not inputs:
            return None, 1.0
        found, factor = pull_back(outputs, inputs, cotangents, part)
        self.add_seen(part, [(*one, at) for one, at in zip(seen, found, strict=False)], factor)
        for name, gradient in zip(names, found[len(seen) :], strict=False):
            if gradient is not None:
                self.add_weight(name, part, gradient, factor)
        return (None if hidden is None else found[-1]), factor
