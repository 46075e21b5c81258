"""Samples laid out for the model: packed into rows, or padded in buckets of like length.

A step's gradient does not depend on the layout: it is that of the mean loss over the learned tokens
of its samples. Packing trains 1.5 times as fast (benchmarks/results/recovery_speed.json).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from llm_pruner.data.sequences import TrainingSequence
from llm_pruner.models.forward import caching, embedding_rows, evaluating, takes

TOLERANCE = 1e-4
"""Largest difference of logits, relative to their largest, that counts as rounding in float32."""

HALF_TOLERANCE = 0.25
"""The same in half precision, whose rounding grows with the depth of a model: relative to how far
the logits are off where the samples of a row do see each other. Trained models have 0.01 to 0.03.
"""

_LOGITS_BYTES = 256 * 2**20
_POSITIONS = 2048


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass.

    Attributes:
        input_ids: int64 of shape (rows, columns).
        position_ids: same shape, from 0 within each sample, by which transformers keeps packed
            samples apart; None where each row is one sample.
        attention_mask: same shape, 1 at tokens of a sample; None where samples are packed.
        learned: bool, same shape.
        samples: indices into the data, in the order of ``learned`` positions.
        tokens: number of positions that are not padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    learned: torch.Tensor
    samples: tuple[int, ...]
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
    input_ids = torch.zeros(shape, dtype=torch.int64, device="cpu")
    learned = torch.zeros(shape, dtype=torch.bool, device="cpu")
    position_ids, mask = (torch.zeros(shape, dtype=torch.int64, device="cpu") for _ in range(2))
    for row, members in enumerate(rows):
        start = 0
        for sample in members:
            one = sequences[sample]
            end = start + len(one)
            input_ids[row, start:end] = torch.from_numpy(one.input_ids)
            learned[row, start:end] = torch.from_numpy(one.learned)
            position_ids[row, start:end] = torch.arange(len(one), device="cpu")
            mask[row, start:end] = 1
            start = end
        # Padding after packed samples counts as a sample of its own, so nothing attends to it.
        position_ids[row, start:] = torch.arange(width - start, device="cpu")
    return Batch(
        input_ids,
        position_ids=position_ids if packed else None,
        attention_mask=None if packed else mask,
        learned=learned,
        samples=tuple(sample for members in rows for sample in members),
        tokens=int(mask.sum()),
    )


class StepSamples:
    """The samples of each step: every pass over the data in an order of its own.

    A function of the arguments alone, so that a run that was interrupted goes on with the same
    data. The last step of a pass may be smaller.
    """

    def __init__(self, count: int, batch_size: int, steps: int, seed: int) -> None:
        self._batch_size, self._steps = batch_size, steps
        self._steps_of_pass = -(-count // batch_size)
        draw = torch.Generator().manual_seed(seed)
        passes = -(-steps // self._steps_of_pass)
        self._orders = [torch.randperm(count, generator=draw, device="cpu") for _ in range(passes)]

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> list[int]:
        if not 0 <= step < self._steps:
            raise IndexError(step)
        number, place = divmod(step, self._steps_of_pass)
        start = place * self._batch_size
        return list(self._orders[number][start : start + self._batch_size].tolist())


def target_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a model, which may be wrapped for several processes.

    Returns float32 logits (n, vocabulary) that predict the target tokens, and these tokens, (n,),
    in the order of ``Batch.samples``.
    """
    logits = model(**arguments_of(model, batch)).logits[:, :-1]
    logits = logits[batch.learned[:, 1:].to(logits.device)].float()
    return logits, target_tokens(batch).to(logits.device)


def target_tokens(batch: Batch) -> torch.Tensor:
    """Return the tokens that a batch teaches, int64 (n,), in the order of ``Batch.samples``."""
    return batch.input_ids[:, 1:][batch.learned[:, 1:]]


def arguments_of(model: Any, batch: Batch) -> dict[str, Any]:
    """Return the arguments that a model takes a batch in, on its device."""
    device, own = next(model.parameters()).device, getattr(model, "module", model)
    keywords: dict[str, Any] = {"input_ids": batch.input_ids.to(device), **caching(own, False)}
    if batch.position_ids is not None:
        keywords["position_ids"] = batch.position_ids.to(device)
    if batch.attention_mask is not None and takes(own, "attention_mask"):  # what is padded is last
        keywords["attention_mask"] = batch.attention_mask.to(device)
    return keywords


def can_pack(model: Any, vocabulary: int) -> bool:
    """Whether a model gives samples in one row the logits that each has alone.

    Tried on random tokens: models with positions by count, recurrences or code of their own see one
    long text.
    """
    random = np.random.default_rng(0)
    lengths = (5, 9, 7, 6)
    sequences = [
        TrainingSequence(random.integers(0, vocabulary, n), np.arange(n) > 0) for n in lengths
    ]
    layout = {"capacity": 14, "micro_tokens": 28}
    everything = range(len(sequences))
    try:
        with evaluating(model), torch.no_grad():
            alone = [
                target_logits(model, lay_out(sequences, [number], packed=False, **layout)[0])[0]
                for number in everything
            ]
            if not takes(model, "position_ids"):
                return False
            for batch in lay_out(sequences, everything, packed=True, **layout):
                wanted = torch.cat([alone[sample] for sample in batch.samples])
                limit = TOLERANCE * max(float(wanted.abs().max()), 1e-6)
                if next(model.parameters()).dtype in (torch.bfloat16, torch.float16):
                    mixed, _ = target_logits(model, replace(batch, position_ids=None))
                    limit = HALF_TOLERANCE * float((mixed - wanted).abs().max())
                found, _ = target_logits(model, batch)
                if not float((found - wanted).abs().max()) <= limit:
                    return False
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False  # whatever a model says to positions that start again, it does not take them
    return True


def micro_tokens(model: Any, seq_len: int, in_chunks: bool = True) -> int:
    """Return the positions of a forward pass: 256 MiB of float32 logits; 2,048 ``in_chunks``."""
    if in_chunks and next(model.parameters()).device.type == "cpu":
        return max(seq_len, _POSITIONS)
    vocabulary = embedding_rows(model)
    return max(seq_len, _LOGITS_BYTES // (4 * vocabulary))
