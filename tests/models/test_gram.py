"""Gram matrices that are multiplied in strips."""

from __future__ import annotations

import pytest
import torch

from llm_pruner.models.linear_modules import add_gram_, complete_gram_


@pytest.mark.parametrize("features", [1, 255, 256, 257, 1100])
def test_strips_give_the_whole_matrix(features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gram = torch.zeros(features, features, dtype=torch.float64)
    expected = torch.zeros_like(gram)
    for _ in range(2):
        for _ in range(2):
            rows = torch.randn(7, features, generator=generator, dtype=torch.float64)
            add_gram_(gram, rows)
            expected += rows.T @ rows
        found = complete_gram_(gram)  # more rows may come behind
        torch.testing.assert_close(found, expected)
        assert torch.equal(found, found.T)
