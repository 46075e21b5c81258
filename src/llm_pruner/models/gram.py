"""Gram matrices, at little more than half the multiplications."""

from __future__ import annotations

import torch

_STRIPS = 4
_NARROW = 256
"""Features of a strip below which more calls would cost more than they save."""


def add_gram_(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Add x^T x to ``gram``, which stays symmetric; strips right of the diagonal are multiplied.

    Args:
        gram: shape (features, features).
        rows: x, shape (tokens, features), of the same dtype and device.
    """
    features = rows.shape[1]
    width = max(_NARROW, -(-features // _STRIPS))
    for start in range(0, features, width):
        stop = min(start + width, features)
        gram[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        square = gram[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)  # a product need not be symmetric
        gram[stop:, start:stop] = gram[start:stop, stop:].T
