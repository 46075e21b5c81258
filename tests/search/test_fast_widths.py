"""``--round-to auto``: which products are timed, and what follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import llm_pruner.search.fast_widths as rounding
from families import discovered
from helpers import tiny_model
from llm_pruner import Selection, discover
from llm_pruner.planning.rounding import largest_multiple
from llm_pruner.search.fast_widths import (
    Product,
    Rounding,
    _Case,
    _products,
    _widths,
    choose_multiple,
    fast_multiple,
    measured_rounding,
)

WIDE = {"hidden_size": 24, "head_dim": 8, "intermediate_size": 1024, "num_hidden_layers": 4}


def test_the_smallest_that_is_nearly_the_fastest() -> None:
    shares = {8: 0.90, 16: 0.969, 32: 0.971, 64: 1.0, 128: 0.99}
    assert choose_multiple(shares) == 32
    assert choose_multiple(shares, tolerance=0.1) == 8
    assert choose_multiple(shares, tolerance=0.0) == 64
    assert choose_multiple({}) == 1


def test_widths_are_multiples_of_no_larger_candidate() -> None:
    for multiple in (8, 16, 32, 64, 128):
        widths = _widths(1536, multiple)
        assert len(widths) == 3
        assert all(width % multiple == 0 and width % (2 * multiple) for width in widths)
        assert all(0.3 * 1536 < width < 0.95 * 1536 for width in widths)
    assert _widths(40, 8) == [24]


def clocked(slow_unless: int, monkeypatch: pytest.MonkeyPatch) -> list[_Case]:
    """Let a machine need a fifth more for widths that are no multiple of ``slow_unless``."""
    timed: list[_Case] = []

    def time(self: _Case, *_: Any) -> float:
        timed.append(self)
        width = self.product.pruned(self.kept)[self.product.dim]
        return self.macs * 1e-9 * (1.0 if width % slow_unless == 0 else 1.2)

    monkeypatch.setattr(_Case, "time", time)
    return timed


@pytest.mark.parametrize("block", [8, 32, 128])
def test_a_machine_that_works_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = clocked(block, monkeypatch)
    products = [Product(1536, 576, 0, 1536, 1, True), Product(576, 1536, 1, 1536, 1, True)]
    found = fast_multiple(products)
    assert found.multiple == block
    assert max(found.throughput.values()) == 1.0
    assert {m for m, share in found.throughput.items() if share < 0.9} == {
        m for m in rounding.CANDIDATES if m < block
    }
    # Five rounds and a first one, of candidates, products, widths, and one token or 128.
    assert len(timed) == 6 * 5 * 2 * 3 * 2


def test_real_products_are_timed() -> None:
    products = [
        Product(96, 24, 0, 96, 1, True),
        Product(24, 96, 1, 96, 1, True),
        Product(24, 192, 1, 96, 2, False),
    ]
    found = fast_multiple(products, (8, 16))
    assert set(found.throughput) == {8, 16}
    assert max(found.throughput.values()) == 1.0
    assert min(found.throughput.values()) > 0.05
    assert fast_multiple([], (8, 16)) == Rounding(1, {})
    assert fast_multiple(products, ()) == Rounding(1, {})


def ffn_products(family: str) -> list[Product]:
    model, discovery = discovered(family)
    return _products(model, discovery, [g for g in discovery.groups if g.kind == "ffn"])


def test_products_of_a_model() -> None:
    # Two linear layers up, one down.
    assert ffn_products("llama") == [
        Product(40, 48, 0, 40, 1, True),
        Product(48, 40, 1, 40, 1, True),
    ]
    # Stored the other way round.
    assert set(ffn_products("gpt2")) == {
        Product(48, 40, 1, 40, 1, False),
        Product(40, 48, 0, 40, 1, False),
    }
    # Gate and up in one matrix: a unit is two of its rows.
    assert Product(80, 48, 0, 40, 2, True) in ffn_products("phi3")
    assert Product(80, 48, 0, 40, 2, True).pruned(30) == (60, 48)
    # All experts in one tensor, of which one matrix at a time is multiplied.
    assert {(p.rows, p.columns, p.dim) for p in ffn_products("mixtral")} == {
        (80, 48, 0),
        (48, 40, 1),
    }


def test_embeddings_are_left_out() -> None:
    model, discovery = discovered("llama")
    hidden = [g for g in discovery.groups if g.kind == "hidden"]
    assert all(100 not in (p.rows, p.columns) for p in _products(model, discovery, hidden))


def test_candidates_must_be_fine_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", **WIDE)
    discovery = discover(model)
    ffn = [g for g in discovery.groups if g.kind == "ffn"]
    total = sum(p.numel() for p in model.parameters())
    # A channel of all four layers is 4 x 3 x 24 parameters; a multiple may be off by half.
    assert largest_multiple(discovery, ffn, "local") == pytest.approx(0.01 * total / (4 * 3 * 24))
    assert largest_multiple(discovery, ffn, "global") == pytest.approx(0.01 * total / (3 * 24))
    assert largest_multiple(discovery, [], "local") == 0
    clocked(128, monkeypatch)
    found = measured_rounding(model, discovery, Selection(("heads", "ffn")), torch.float32)
    # 32 would be faster, but leaves no size near enough to a target.
    assert list(found.throughput) == [8]
    assert found.multiple == 8
    ranked = measured_rounding(
        model, discovery, Selection(("heads", "ffn"), scope="global"), torch.float32
    )
    assert list(ranked.throughput) == [8, 16, 32]
    assert ranked.multiple == 8
    heads_alone = measured_rounding(model, discovery, Selection(("heads",)), torch.float32)
    assert heads_alone == Rounding(1, {})
    assert np.isclose(found.tolerance, 0.03)
