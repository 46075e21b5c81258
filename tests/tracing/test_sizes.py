"""Integers that remember their origin, and the solver for module attributes."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

from llm_pruner.errors import InfeasibleError
from llm_pruner.tracing.lengths import reduce_constraints
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
        lambda size: size - 0.5,
        lambda size: 1.0 / size,
        lambda size: 0.5 * size,
        lambda size: 2.0**size,
        lambda size: math.log(size),
        lambda size: math.gcd(size, 6),
        lambda size: int(size),
        lambda size: [*range(20)][size],
        lambda size: [*range(20)][:size],
        lambda size: [0] * size,
        lambda size: len(range(size)),
        lambda size: size & 3,
        lambda size: 1 << size,
        lambda size: ~size,
        lambda size: size.bit_length(),
        lambda size: size.real,
        lambda size: str(size),
        lambda size: f"{size:03}",
        lambda size: "%d" % size,  # noqa: UP031
        lambda size: hash(size),
        lambda size: bytes(size),
        lambda size: complex(size),
        lambda size: round(size, -1),
        lambda size: np.array(size).item(),
        lambda size: np.float32(size),
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
    assert (uses.size << 1).expr == ("*", SIZE, ("const", 2))
    assert (uses.size >> 1).expr == ("//", SIZE, ("const", 2))
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


def test_solve_single_and_composite_sizes() -> None:
    fused = ("*", ("const", 3), ("*", HEADS, SIZE))
    found = solve(
        [(fused, 3 * 4 * 6, "view"), (SIZE, 6, "view"), (("*", HEADS, SIZE), 24, "view")], OLD, {}
    )
    assert found == {("attn", "heads"): 4, ("attn", "size"): 6}


def test_solve_leaves_what_need_not_change() -> None:
    assert solve([(SIZE, 8, "view"), (("*", HEADS, SIZE), 48, "view")], OLD, {}) == {}


def test_solve_composite_with_nothing_else_known() -> None:
    found = solve([(("*", HEADS, SIZE), 24, "view")], OLD, {})
    values = {**OLD, **{("attr", *key): value for key, value in found.items()}}
    assert values[HEADS] * values[SIZE] == 24


def test_solve_quotient() -> None:
    assert solve([(("//", WIDTH, HEADS), 5, "view"), (HEADS, 6, "view")], OLD, {}) == {
        ("attn", "width"): 30
    }
    half = ("//", SIZE, ("const", 2))
    assert solve([(half, 3, "slice"), (SIZE, 6, "view")], OLD, {}) == {("attn", "size"): 6}


def test_solve_an_attribute_that_occurs_twice() -> None:
    square = ("*", SIZE, SIZE)
    assert solve([(square, 49, "view")], OLD, {}) == {("attn", "size"): 7}
    with pytest.raises(InfeasibleError, match=r"no value of attn\.size makes"):
        solve([(square, 50, "view")], OLD, {})


def test_solve_differences_and_divisors() -> None:
    assert solve([(("-", WIDTH, SIZE), 30, "slice"), (SIZE, 8, "view")], OLD, {}) == {
        ("attn", "width"): 38
    }
    assert solve([(("-", ("const", 0), ("-", ("const", 0), SIZE)), 5, "slice")], OLD, {}) == {
        ("attn", "size"): 5
    }
    assert solve([(("//", ("const", 48), SIZE), 8, "view")], OLD, {}) == {("attn", "size"): 6}


def test_solve_with_the_length_of_an_axis() -> None:
    axis = ("len", 0)
    assert solve([(("//", axis, HEADS), 8, "view")], OLD, {axis: 32}) == {("attn", "heads"): 4}


def test_solve_refuses_contradictions() -> None:
    with pytest.raises(InfeasibleError, match=r"view: attn.size is 6 but 8 positions are left"):
        solve([(SIZE, 6, "view"), (SIZE, 8, "view")], OLD, {})
    with pytest.raises(InfeasibleError, match=r"no value of attn.heads makes \(attn.heads \* attn"):
        solve([(SIZE, 7, "view"), (("*", HEADS, SIZE), 24, "split")], OLD, {})
    with pytest.raises(InfeasibleError, match="split: 4 is 4 but 3 positions are left"):
        solve([(("const", 4), 3, "split")], OLD, {})


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


def test_solve_a_size_before_its_half() -> None:
    half = (("//", WIDTH, ("const", 2)), OLD[WIDTH] // 2 - 1, "slice")
    new = OLD[WIDTH] - 1
    for equations in ([half, (WIDTH, new, "view")], [(WIDTH, new, "view"), half]):
        assert solve(equations, OLD, {}) == {WIDTH[1:]: new}
