"""Hooks that see the inputs of consumers and sum up what criteria ask for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from llm_pruner.importance.observation import Reading
from llm_pruner.models.consumers import Consumer, add_gram_, weight_of
from llm_pruner.types import FloatArray

SEGMENT = 128
"""Tokens whose contributions to a gate's derivative are summed before they are squared."""


def segments(length: int) -> int:
    """Return the number of segments of a sample of ``length`` tokens."""
    return -(-length // SEGMENT)


def sum_segments(values: torch.Tensor) -> torch.Tensor:
    """Sum over each segment: (samples, tokens, features) -> (samples, segments, features)."""
    return torch.stack([part.sum(1) for part in values.split(SEGMENT, dim=1)], dim=1)


class ConsumerTap:
    """Sums over the inputs of linear modules and their gradients, group by group.

    Args:
        model: holds the modules.
        consumers: group name -> its consumers.
        shape: (samples, seq_len) of the calibration tokens.
        needs: of ``gates``, ``tokens``, ``moments``, ``gram``.
    """

    def __init__(
        self,
        model: nn.Module,
        consumers: Mapping[str, Sequence[Consumer]],
        shape: tuple[int, int],
        needs: Collection[str],
    ) -> None:
        self._model = model
        self.needs = needs
        self._length = shape[1]
        self._seen: list[tuple[str, torch.Tensor]] = []
        self._by_module: dict[str, list[Consumer]] = {}
        self.gates: dict[str, FloatArray] = {}
        self.token_squares: dict[str, FloatArray] = {}
        for name, found in consumers.items():
            if not found:
                continue
            self.gates[name] = np.zeros((shape[0], segments(shape[1]), len(found[0].index)))
            for consumer in found:
                self._by_module.setdefault(consumer.module, []).append(consumer)
        self._tokens = dict.fromkeys(self._by_module, 0)
        self._total: dict[str, torch.Tensor] = {}
        self._square: dict[str, torch.Tensor] = {}
        self._gram: dict[str, torch.Tensor] = {}

    @contextmanager
    def listening(self, *, to_all: bool = False) -> Iterator[None]:
        """Inside, inputs are noted wherever gradients are recorded.

        Args:
            to_all: note all inputs, as they are.
        """
        note = self._look if to_all else self._note
        handles = [
            self._model.get_submodule(path).register_forward_pre_hook(
                lambda _module, args, path=path: note(path, args)
            )
            for path in self._by_module
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, path: str, args: tuple[torch.Tensor, ...]) -> None:
        self._seen.append((path, args[0]))

    def _note(self, path: str, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Note an input, which becomes a leaf if nothing below it takes a gradient."""
        if not torch.is_grad_enabled():
            return None
        value, *rest = args
        fresh = not value.requires_grad
        if fresh:
            value = value.detach().requires_grad_()
        self._seen.append((path, value))
        return (value, *rest) if fresh else None

    def taken(self) -> list[tuple[str, torch.Tensor]]:
        """Return (module, input) noted since the last call, and forget them."""
        seen, self._seen = self._seen, []
        return seen

    def give(
        self,
        part: slice,
        tapped: Sequence[tuple[str, torch.Tensor]],
        gradients: Sequence[torch.Tensor | None],
        factor: float,
    ) -> None:
        """Add the samples of ``part``: inputs as noted, their gradients over ``factor``."""
        with torch.no_grad():
            for (path, value), gradient in zip(tapped, gradients, strict=True):
                value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
                if gradient is not None and {"gates", "tokens"} & set(self.needs):
                    product = value * gradient
                    self._add_gates(path, part, product, factor)
                    if "tokens" in self.needs:
                        self._add_tokens(path, product.flatten(0, -2), factor)
                if "moments" in self.needs or "gram" in self.needs:
                    self._add_moments(path, value.flatten(0, -2))

    def _add_gates(self, path: str, part: slice, product: torch.Tensor, factor: float) -> None:
        count = part.stop - part.start
        if product.shape[:-1] == (count, self._length):
            rows = sum_segments(product)
        elif count == 1:
            # Which token a row belongs to is unknown: the whole sample is one segment.
            rows = product.flatten(0, -2).sum(0)[None, None]
        else:
            raise MixedSamplesError(path)
        features = rows.double().mul_(factor).cpu().numpy()
        for consumer in self._by_module[path]:
            self.gates[consumer.group][part, : rows.shape[1]] += features[:, :, consumer.index].sum(
                3
            )

    def _add_tokens(self, path: str, rows: torch.Tensor, factor: float) -> None:
        for consumer in self._by_module[path]:
            index = torch.from_numpy(consumer.index).to(rows.device)
            if index.shape[1] == 1:
                squares = rows.square().sum(0)[index[:, 0]]
            else:
                squares = rows[:, index].sum(2).square().sum(0)
            found = squares.double().mul(factor**2).cpu().numpy()
            self.token_squares[consumer.group] = self.token_squares.get(consumer.group, 0) + found

    def _add_moments(self, path: str, rows: torch.Tensor) -> None:
        self._tokens[path] += len(rows)
        self._total[path] = self._total.get(path, 0) + rows.sum(0).double()
        self._square[path] = self._square.get(path, 0) + rows.square().sum(0).double()
        if "gram" in self.needs:
            if path not in self._gram:
                self._gram[path] = rows.new_zeros(rows.shape[1], rows.shape[1])
            add_gram_(self._gram[path], rows)

    def forget(self, consumers: Sequence[Consumer]) -> None:
        """Drop what was summed up for some of the consumers."""
        for consumer in consumers:
            for kept in (self._total, self._square, self._gram):
                kept.pop(consumer.module, None)

    def readings(self, consumers: Sequence[Consumer]) -> tuple[Reading, ...]:
        """Return the sums for some of the consumers; what was never called is left out."""
        return tuple(
            Reading(
                consumer,
                weight_of(self._model.get_submodule(consumer.module)).float(),
                self._tokens[consumer.module],
                self._total[consumer.module].cpu().numpy(),
                self._square[consumer.module].cpu().numpy(),
                self._gram.get(consumer.module),
            )
            for consumer in consumers
            if consumer.module in self._total
        )


class MixedSamplesError(Exception):
    """A module gets the tokens of several samples in one row: take samples one at a time."""
