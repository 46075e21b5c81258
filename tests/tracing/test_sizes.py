"""Integers that remember their origin, and the solver for module attributes."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

from llm_pruner.discovery.lengths import reduce_constraints
from llm_pruner.errors import InfeasibleError
from llm_pruner.tracing.sizes import (
    PLACE,
    Expr,
    TracedInt,
    TracedShape,
    describe,
    evaluate,
    expr_of,
    leaves,
    plain,
    solve,
)

HEADS, SIZE, WIDTH = ("attr", "attn", "heads"), ("attr", "attn", "size"), ("attr", "attn", "width")


class Uses:
    """Records which expressions were used as numbers."""

    def __init__(self) -> None:
        self.seen: list[Expr] = []
        self.heads = TracedInt(6, HEADS, self.seen.append)
        self.size = TracedInt(8, SIZE, self.seen.append)


def test_arithmetic_keeps_value_and_origin() -> None:
    uses = Uses()
    heads, size = uses.heads, uses.size
    cases = [
        (heads * size, 48, ("*", HEADS, SIZE)),
        (3 * size, 24, ("*", ("const", 3), SIZE)),
        (size // 2, 4, ("//", SIZE, ("const", 2))),
        (size + 1, 9, ("+", SIZE, ("const", 1))),
        (1 + size, 9, ("+", ("const", 1), SIZE)),
        (10 - size, 2, ("-", ("const", 10), SIZE)),
        (-size, -8, ("-", ("const", 0), SIZE)),
        (50 // size, 6, ("//", ("const", 50), SIZE)),
        (size % 3, 2, ("%", SIZE, ("const", 3))),
        (math.prod((2, heads, size)), 96, None),
        (sum([heads, size]), 14, None),
    ]
    for result, value, expr in cases:
        assert isinstance(result, TracedInt)
        assert plain(result) == value
        assert evaluate(result.expr, {HEADS: 6, SIZE: 8}) == value
        assert expr is None or result.expr == expr
    assert [plain(part) for part in divmod(size, 3)] == [2, 2]
    assert uses.seen == []


def test_behaves_as_an_int() -> None:
    size = Uses().size
    assert size == 8
    assert size != 7
    assert hash(size) == hash(8)
    assert {8: "found"}[size] == "found"
    assert [*range(10)][size] == 8
    assert list(range(size)) == list(range(8))
    assert type(pickle.loads(pickle.dumps(size))) is int
    assert isinstance(size, int)
    assert copy.deepcopy(size) is size
    with pytest.raises(ZeroDivisionError):
        size // 0
    with pytest.raises(TypeError):
        size + "1"


@pytest.mark.parametrize(
    "use",
    [
        lambda size: 1 / size,
        lambda size: size / 2,
        lambda size: size**-0.5,
        lambda size: 2**size,
        lambda size: float(size),
        lambda size: math.sqrt(size),
        lambda size: size * 0.5,
        lambda size: 1.0 / size,
        lambda size: 2.0**size,
        lambda size: math.gcd(size, 6),
        lambda size: int(size),
        lambda size: [*range(20)][size],
        lambda size: [*range(20)][:size],
        lambda size: [0] * size,
        lambda size: size & 3,
        lambda size: 1 << size,
        lambda size: size.bit_length(),
        lambda size: size.real,
        lambda size: str(size),
        lambda size: f"{size:03}",
        lambda size: "%d" % size,  # noqa: UP031
        lambda size: hash(size),
        lambda size: bytes(size),
        lambda size: round(size, -1),
        lambda size: np.array(size).item(),
        lambda size: np.full(3, size).sum(),
        lambda size: torch.tensor([0.0, 1.0]).tolist() * size,
    ],
)
def test_use_as_a_number_is_reported(use: object) -> None:
    uses = Uses()
    result = use(uses.size)  # type: ignore[operator]
    assert result == use(8)  # type: ignore[operator]
    assert type(result) is not TracedInt
    assert {leaf for expr in uses.seen for leaf in leaves(expr)} == {SIZE}
    assert {expr[0] for expr in uses.seen} <= {"attr", PLACE}


def test_comparison_with_another_size_is_reported() -> None:
    uses = Uses()
    length = TracedInt(8, ("len", 0), uses.seen.append)
    assert length == uses.size
    assert (length != uses.size) is False
    assert uses.seen == [("==", ("len", 0), SIZE), ("!=", ("len", 0), SIZE)]
    assert min(uses.size, 6) == 6
    assert uses.seen[-1] == (">", SIZE, ("const", 6))
    assert uses.size != "auto"
    assert len(uses.seen) == 3


def test_whole_numbers_of_a_size_stay_sizes() -> None:
    uses = Uses()
    for same in (+uses.size, abs(uses.size), round(uses.size), math.floor(uses.size)):
        assert same is uses.size
    shape = TracedShape((2, uses.heads, uses.size))
    assert isinstance(shape, torch.Size)
    assert evaluate(shape.numel().expr, {HEADS: 6, SIZE: 8}) == 96
    assert evaluate(shape[1:].numel().expr, {HEADS: 6, SIZE: 8}) == 48
    assert uses.seen == []


def test_use_by_numpy_is_reported() -> None:
    uses = Uses()
    assert np.sqrt(uses.size * 2) == 4
    assert uses.seen == [("*", SIZE, ("const", 2))]


def test_origin_of_plain_integers_and_description() -> None:
    uses = Uses()
    assert expr_of(5) == ("const", 5)
    product = 3 * uses.heads * uses.size
    assert describe(product.expr) == "((3 * attn.heads) * attn.size)"
    assert set(leaves(product.expr)) == {HEADS, SIZE}


OLD = {HEADS: 6, SIZE: 8, WIDTH: 48}
AXIS = ("len", 0)
FUSED = ("*", ("const", 3), ("*", HEADS, SIZE))


@pytest.mark.parametrize(
    ("equations", "found"),
    [
        ([(FUSED, 72), (SIZE, 6), (("*", HEADS, SIZE), 24)], {HEADS: 4, SIZE: 6}),
        ([(SIZE, 8), (("*", HEADS, SIZE), 48)], {}),  # nothing need change
        ([(("*", HEADS, SIZE), 24)], {SIZE: 4}),  # nothing else is known
        ([(("//", WIDTH, HEADS), 5), (HEADS, 6)], {WIDTH: 30}),
        ([(("//", SIZE, ("const", 2)), 3), (SIZE, 6)], {SIZE: 6}),
        ([(("//", WIDTH, ("const", 2)), 23), (WIDTH, 47)], {WIDTH: 47}),  # not 46, by its half
        ([(("*", SIZE, SIZE), 49)], {SIZE: 7}),  # occurs twice
        ([(("-", WIDTH, SIZE), 30), (SIZE, 8)], {WIDTH: 38}),
        ([(("-", ("const", 0), ("-", ("const", 0), SIZE)), 5)], {SIZE: 5}),
        ([(("//", ("const", 48), SIZE), 8)], {SIZE: 6}),
        ([(("//", AXIS, HEADS), 8)], {HEADS: 4}),
    ],
)
def test_solve(equations: list[tuple[Expr, int]], found: dict[Expr, int]) -> None:
    wanted = {leaf[1:]: value for leaf, value in found.items()}
    assert solve([(*one, "view") for one in equations], OLD, {AXIS: 32}) == wanted


def test_solve_refuses_contradictions() -> None:
    with pytest.raises(InfeasibleError, match=r"view: attn.size is 6 but 8 positions are left"):
        solve([(SIZE, 6, "view"), (SIZE, 8, "view")], OLD, {})
    with pytest.raises(InfeasibleError, match=r"no value of attn.heads makes \(attn.heads \* attn"):
        solve([(SIZE, 7, "view"), (("*", HEADS, SIZE), 24, "split")], OLD, {})
    with pytest.raises(InfeasibleError, match="split: 4 is 4 but 3 positions are left"):
        solve([(("const", 4), 3, "split")], OLD, {})
    with pytest.raises(InfeasibleError, match=r"no value of attn\.size makes"):
        solve([(("*", SIZE, SIZE), 50, "view")], OLD, {})


def test_constraints_of_two_groups_give_ratios() -> None:
    # Half as many pairs as channels: removing a pair removes two channels.
    follows, stuck = reduce_constraints([({0: Fraction(2), 1: Fraction(-1)}, "view")])
    assert follows == {1: (0, Fraction(2))}
    assert stuck == {}


def test_chained_constraints_have_one_leader() -> None:
    one = Fraction(1)
    follows, stuck = reduce_constraints(
        [({0: one, 1: -one}, "a"), ({1: one, 2: -one}, "b"), ({0: one, 2: -one}, "c")]
    )
    assert follows == {1: (0, one), 2: (0, one)}
    assert stuck == {}


def test_group_that_must_lose_nothing() -> None:
    one = Fraction(1)
    follows, stuck = reduce_constraints([({0: one}, "view"), ({0: one, 1: -one}, "split")])
    assert follows == {}
    assert set(stuck) == {0, 1}
    assert "view" in stuck[0]
    # Growing with another is no removal.
    _, stuck = reduce_constraints([({0: one, 1: one}, "view")])
    assert set(stuck) == {0, 1}


def test_relation_of_three_fixes_the_shared_group() -> None:
    one = Fraction(1)
    follows, stuck = reduce_constraints(
        [
            ({0: 2 * one, 1: one, 2: -one}, "first layer"),
            ({0: 2 * one, 3: one, 4: -one}, "second layer"),
        ]
    )
    assert set(stuck) == {0}
    assert "first layer" in stuck[0]
    assert follows == {2: (1, one), 4: (3, one)}
