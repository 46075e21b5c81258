"""Samples laid out for the model: packed into rows, or padded in buckets of like length.

A step's gradient does not depend on the layout: it is that of the mean loss over the learned tokens
of the step's samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm_pruner.data.sequences import TrainingSequence


@dataclass(frozen=True)
class Part:
    """Where a sample lies in a batch: its row, its first column, its index in the data."""

    row: int
    start: int
    sample: int


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass.

    Attributes:
        input_ids: int64 of shape (rows, columns).
        position_ids: same shape, from 0 within each sample where samples are packed, so that
            transformers keeps their attention apart; None where each row is one sample.
        attention_mask: same shape, 1 at tokens of a sample; None where samples are packed.
        learned: bool, same shape.
        parts: the samples, row by row and from left to right: the order of ``learned`` positions.
        tokens: number of positions that are not padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    learned: torch.Tensor
    parts: tuple[Part, ...]
    tokens: int

    @property
    def targets(self) -> int:
        """Number of learned tokens."""
        return int(self.learned.sum())


def lay_out(
    sequences: Sequence[TrainingSequence],
    samples: Sequence[int],
    *,
    packed: bool,
    capacity: int,
    micro_tokens: int,
    shares: int = 1,
) -> list[Batch]:
    """Return batches that together hold these samples once each.

    Args:
        sequences: all data.
        samples: indices into it.
        packed: put several samples in a row of at most ``capacity`` tokens (first fit, longest
            first); else a row holds one sample, and rows of like length share a batch.
        micro_tokens: positions in a batch, at least one row.
        shares: make at least so many batches where the samples allow it, so that as many processes
            have something to do.
    """
    # Ties keep their order, so that the layout is a function of the samples alone.
    order = sorted(samples, key=lambda sample: -len(sequences[sample]))
    rows: list[list[int]] = []
    if packed:
        rows = _first_fit(sequences, order, capacity)
        if len(rows) < shares:
            rows = _even(sequences, order, min(shares, len(order)), capacity) or rows
        rows.sort(key=lambda row: -sum(len(sequences[sample]) for sample in row))
    else:
        rows = [[sample] for sample in order]
    batches: list[Batch] = []
    most = max(1, len(rows) // shares)
    start = 0
    while start < len(rows):
        width = sum(len(sequences[sample]) for sample in rows[start])
        count = max(1, min(micro_tokens // width, most))
        batches.append(_batch(sequences, rows[start : start + count], width, packed))
        start += count
    return batches


def _first_fit(
    sequences: Sequence[TrainingSequence], order: Sequence[int], capacity: int
) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in order:
        length = len(sequences[sample])
        place = next((row for row, left in enumerate(room) if left >= length), None)
        if place is None:
            rows.append([sample])
            room.append(capacity - length)
        else:
            rows[place].append(sample)
            room[place] -= length
    return rows


def _even(
    sequences: Sequence[TrainingSequence], order: Sequence[int], count: int, capacity: int
) -> list[list[int]]:
    """Return ``count`` rows of like length; none if one would be longer than ``capacity``."""
    rows: list[list[int]] = [[] for _ in range(count)]
    lengths = [0] * count
    for sample in order:
        place = lengths.index(min(lengths))
        rows[place].append(sample)
        lengths[place] += len(sequences[sample])
    return rows if max(lengths) <= capacity else []


def _batch(
    sequences: Sequence[TrainingSequence], rows: Sequence[Sequence[int]], width: int, packed: bool
) -> Batch:
    shape = (len(rows), width)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    learned = torch.zeros(shape, dtype=torch.bool)
    # Padding after packed samples counts as a sample of its own, so nothing attends to it.
    position_ids = torch.arange(width).expand(shape).clone() if packed else None
    mask = None if packed else torch.zeros(shape, dtype=torch.int64)
    parts = []
    for row, members in enumerate(rows):
        start = 0
        for sample in members:
            one = sequences[sample]
            end = start + len(one)
            input_ids[row, start:end] = torch.from_numpy(one.input_ids)
            learned[row, start:end] = torch.from_numpy(one.learned)
            if position_ids is not None:
                position_ids[row, start:end] = torch.arange(len(one))
            if mask is not None:
                mask[row, start:end] = 1
            parts.append(Part(row, start, sample))
            start = end
        if position_ids is not None:
            position_ids[row, start:] = torch.arange(width - start)
    tokens = sum(len(sequences[part.sample]) for part in parts)
    return Batch(input_ids, position_ids, mask, learned, tuple(parts), tokens)


def step_samples(count: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Return the samples of each step: every pass over the data in an order of its own.

    A function of its arguments alone, so that a run that was interrupted goes on with the same
    data. The last step of a pass may be smaller.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: list[list[int]] = []
    while len(chosen) < steps:
        order = torch.randperm(count, generator=generator).tolist()
        chosen.extend(order[i : i + batch_size] for i in range(0, count, batch_size))
    return chosen[:steps]
