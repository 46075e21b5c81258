"""Token sequences to train on: what the data room makes and the recovery room reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TrainingSequence:
    """One sample: tokens, and which of them the model is to learn.

    Attributes:
        input_ids: int64 of shape (length,), with the special tokens that belong to the sample.
        learned: bool of shape (length,); position t is predicted from the tokens before it, so the
            first is never learned.
        source: index of the source that it came from.
    """

    input_ids: npt.NDArray[np.int64]
    learned: npt.NDArray[np.bool_]
    source: int = 0

    @property
    def targets(self) -> int:
        """Number of tokens that are learned."""
        return int(self.learned.sum())

    def __len__(self) -> int:
        return len(self.input_ids)


def make_sequence(ids: Sequence[int], learned: Sequence[bool], source: int) -> TrainingSequence:
    """Return a sequence; its first token counts as given."""
    mask = np.array(learned, dtype=np.bool_)
    if len(mask):
        mask[0] = False
    return TrainingSequence(np.array(ids, dtype=np.int64), mask, source)
