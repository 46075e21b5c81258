"""Peak memory: tensors that live at once."""

from __future__ import annotations

import torch

from helpers import tiny_model
from llm_pruner.evaluation.footprint import Follower, measure_memory

MATRIX = 100 * 100 * 4
CACHE = 3 * 2 * 3 * 8 * 4
"""Bytes of a token in the cache of the tiny Llama: layers, keys and values, heads, size."""


def test_tensors_count_while_they_live() -> None:
    outside = torch.ones(100, 100)
    with torch.no_grad(), Follower() as peak:
        a = outside + 1
        b = outside @ a
        assert peak() == 2 * MATRIX
        del a
        assert peak() == 2 * MATRIX  # since the last call, before it went
        assert peak() == MATRIX
        view = b.T[:50]
        b.add_(1)
        del b
        assert peak() == MATRIX  # the view holds the memory
        del view
        peak()
        assert peak() == 0


def test_weights_cache_and_activations() -> None:
    model = tiny_model()
    weights = sum(p.numel() * 4 for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    found = {n: measure_memory(model, prompt_tokens=n, new_tokens=3) for n in (20, 60)}
    assert found[20] == measure_memory(model, prompt_tokens=20, new_tokens=3)
    for tokens, memory in found.items():
        # The widest moment of a layer: hidden states, both halves of the FFN and their product.
        assert memory.prefill >= weights + buffers + tokens * (CACHE + 4 * (48 + 3 * 80))
        assert memory.prefill <= weights + buffers + tokens * (CACHE + 4 * (4 * 48 + 3 * 80)) + 5000
        assert weights + buffers + (tokens + 3) * CACHE <= memory.decode <= memory.prefill
    # A step copies one layer's cache at a time: the keys and values of one of three.
    grown = found[60].decode - found[20].decode
    assert 40 * CACHE <= grown <= 40 * (CACHE + CACHE // 3)
    batch = measure_memory(model, prompt_tokens=60, new_tokens=3, batch_size=2)
    assert batch.prefill - weights > 1.8 * (found[60].prefill - weights)
    assert (batch.batch_size, batch.prompt_tokens, batch.new_tokens) == (2, 60, 3)
