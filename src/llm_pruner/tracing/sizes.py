"""Integers that remember where they came from, and the equations that they give.

During a trace every integer attribute of the model is a ``TracedInt``: it remembers the attribute
or the tensor axis that it was read from, and the arithmetic since. When it sizes an axis (``view``,
``split``, a slice ...) an ``Equation`` is recorded. After a removal the lengths are known, and the
equations are solved for the attributes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from llm_pruner.errors import InfeasibleError
from llm_pruner.types import IntArray

Expr: TypeAlias = tuple[Any, ...]
"""('const', value) | ('attr', module, name) | ('len', axis) | (operator, left, right)

The operator is one of ``ARITHMETIC``, or of ``COMPARISONS`` at the top."""

Attribute: TypeAlias = tuple[str, str]
"""(module, attribute name)"""

PLACE = "place"
"""Marks an expression whose value indexes a list or is a key."""

ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

_OPERATORS = ARITHMETIC | COMPARISONS


def _counted(size: TracedInt, symbol: str, other: Any, swap: bool = False) -> Any:
    """Return the sum, product, ... of a size and an integer: a size again."""
    plain_other = plain(other)
    if isinstance(plain_other, torch.Tensor):
        return NotImplemented  # the function that takes both is watched
    if type(plain_other) is not int:
        # With a bool, float, list or array the result is no size.
        return _calculated(size, ARITHMETIC[symbol], other, swap)
    left, right = (other, size) if swap else (size, other)
    value = ARITHMETIC[symbol](plain(left), plain(right))
    return TracedInt(value, (symbol, expr_of(left), expr_of(right)), size.on_value)


def _calculated(
    size: TracedInt, function: Callable[[Any, Any], Any], other: Any, swap: bool = False
) -> Any:
    """Return a function of the value of a size, which is used as a number."""
    if isinstance(other, torch.Tensor):
        return NotImplemented
    left, right = (_read(other), _read(size)) if swap else (_read(size), _read(other))
    return function(left, right)


def _compared(size: TracedInt, symbol: str, other: Any) -> Any:
    value = plain(other)
    if isinstance(value, torch.Tensor):
        return NotImplemented
    if isinstance(value, int | float):
        size.on_value((symbol, size.expr, expr_of(other)))
    return COMPARISONS[symbol](size.value, value)


def _operators(how: Callable[..., Any], what: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return a binary operator of sizes and its reflected form."""
    return (
        lambda self, other: how(self, what, other),
        lambda self, other: how(self, what, other, swap=True),
    )


class TracedInt(torch.SymInt):
    """An integer with its origin.

    ``isinstance`` takes it for an ``int``, but it is none: C code reads the value of a subclass of
    ``int`` directly (``1.0 / size``, ``math.log(size)``, ``table[size]``). An object that only
    converts to a number must be asked, so every use as a number is noticed. PyTorch accepts a
    ``SymInt`` wherever it accepts an integer.

    Integer arithmetic gives another ``TracedInt``. Every other use calls ``on_value``: with the
    expression whose value is used as a number, with ``(PLACE, expression)`` if its value indexes
    something, and with ``(symbol, left, right)`` for a comparison.
    """

    def __init__(self, value: int, expr: Expr, on_value: Callable[[Expr], None]) -> None:
        self.value = value
        self.expr = expr
        self.on_value = on_value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return int

    def _read(self) -> int:
        """Return the value, and report that it is used as a number."""
        self.on_value(self.expr)
        return self.value

    def _place(self) -> int:
        """Return the value, and report that it indexes something."""
        self.on_value((PLACE, self.expr))
        return self.value

    __add__, __radd__ = _operators(_counted, "+")
    __sub__, __rsub__ = _operators(_counted, "-")
    __mul__, __rmul__ = _operators(_counted, "*")
    __floordiv__, __rfloordiv__ = _operators(_counted, "//")
    __mod__, __rmod__ = _operators(_counted, "%")

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __lshift__(self, other: Any) -> Any:
        return self * (1 << plain(other)) if type(other) is int else self._read() << other

    def __rshift__(self, other: Any) -> Any:
        return self // (1 << plain(other)) if type(other) is int else self._read() >> other

    def __invert__(self) -> int:
        return ~self._read()

    def __neg__(self) -> Any:
        return _counted(self, "-", 0, swap=True)

    def __pos__(self) -> TracedInt:
        return self

    def __abs__(self) -> TracedInt:
        return self if self.value >= 0 else -self

    __trunc__ = __floor__ = __ceil__ = __copy__ = __pos__

    def __round__(self, digits: int | None = None) -> Any:
        return self if digits is None else round(self._read(), digits)

    def __bool__(self) -> bool:
        return bool(self != 0)

    # ------------------------------------------------------ uses as a number

    __index__, __int__ = _place, _read

    def __float__(self) -> float:
        return float(self._read())

    __truediv__, __rtruediv__ = _operators(_calculated, operator.truediv)
    __and__, __rand__ = _operators(_calculated, operator.and_)
    __or__, __ror__ = _operators(_calculated, operator.or_)
    __xor__, __rxor__ = _operators(_calculated, operator.xor)
    __rlshift__ = _operators(_calculated, operator.lshift)[1]
    __rrshift__ = _operators(_calculated, operator.rshift)[1]
    __pow__, __rpow__ = _operators(_calculated, operator.pow)

    def __getattr__(self, name: str) -> Any:
        """Return what ``int`` has under this name (``real``, ``bit_length``)."""
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.value, name)
        self.on_value(self.expr)
        return value

    def __repr__(self) -> str:
        return repr(self._read())

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(self._read(), spec)

    def __hash__(self) -> int:
        # A value stored under a size would be found by any equal size.
        return hash(self._place())

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.asarray(self._read(), *args, **kwargs)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return getattr(ufunc, method)(*map(_read, inputs), **kwargs)

    __eq__ = _operators(_compared, "==")[0]
    __ne__ = _operators(_compared, "!=")[0]
    __lt__ = _operators(_compared, "<")[0]
    __le__ = _operators(_compared, "<=")[0]
    __gt__ = _operators(_compared, ">")[0]
    __ge__ = _operators(_compared, ">=")[0]

    def __deepcopy__(self, memo: Any) -> TracedInt:
        return self

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return int, (self._read(),)


def plain(value: Any) -> Any:
    """Return a traced integer as a plain one, without reporting it; anything else as it is."""
    return value.value if type(value) is TracedInt else value


def _read(value: Any) -> Any:
    return value._read() if type(value) is TracedInt else value


class TracedShape(tuple[Any, ...]):
    """A shape of traced sizes; ``torch.Size`` would make plain numbers of them."""

    __slots__ = ()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Size

    def numel(self) -> Any:
        """Return the product of the sizes."""
        return math.prod(self)

    def __getitem__(self, item: Any) -> Any:
        found = super().__getitem__(item)
        return TracedShape(found) if isinstance(item, slice) else found

    def __add__(self, other: Any) -> Any:
        return TracedShape((*self, *other))

    def __radd__(self, other: Any) -> Any:
        return TracedShape((*other, *self))


def expr_of(value: Any) -> Expr:
    """Return the origin of an integer; a plain int is a constant."""
    return value.expr if type(value) is TracedInt else ("const", value)


def leaves(expr: Expr) -> Iterator[Expr]:
    """Yield the attributes and axes that an expression reads."""
    if expr[0] in ("attr", "len"):
        yield expr
    elif expr[0] == PLACE:
        yield from leaves(expr[1])
    elif expr[0] in _OPERATORS:
        yield from leaves(expr[1])
        yield from leaves(expr[2])


def evaluate(expr: Expr, values: Mapping[Expr, int]) -> int:
    """Return the value of an expression, or whether a comparison holds; KeyError without a leaf."""
    if expr[0] == "const":
        return expr[1]
    if expr[0] in ("attr", "len"):
        return values[expr]
    return _OPERATORS[expr[0]](evaluate(expr[1], values), evaluate(expr[2], values))


def describe(expr: Expr) -> str:
    """Return an expression as a reader would write it."""
    if expr[0] == "const":
        return str(expr[1])
    if expr[0] == "attr":
        return f"{expr[1]}.{expr[2]}" if expr[1] else str(expr[2])
    if expr[0] == "len":
        return "the length of another axis"
    return f"({describe(expr[1])} {expr[0]} {describe(expr[2])})"


@dataclass(frozen=True)
class Equation:
    """``expr`` is the number of positions of the axis ``rows``; ``where`` names the operation."""

    expr: Expr
    rows: IntArray
    where: str


def solve(
    equations: list[tuple[Expr, int, str]], old: Mapping[Expr, int], lengths: Mapping[Expr, int]
) -> dict[Attribute, int]:
    """Return the attributes that must change, with their new values; InfeasibleError if none can.

    ``equations`` are (expression, length of the axis after the removal, where it was seen), ``old``
    has the value of every attribute, ``lengths`` that of every axis leaf after the removal.
    """
    values: dict[Expr, int] = dict(lengths)
    # Single attributes first, as the composite sizes that contain them follow; an axis of the
    # attribute's own size before one of half of it, which two values may give.
    pending = sorted(
        equations,
        key=lambda equation: (len(set(leaves(equation[0]))), equation[0] not in old),
    )
    while pending:
        rest = []
        for expr, length, where in pending:
            unknown = {leaf for leaf in leaves(expr) if leaf not in values}
            if len(unknown) > 1:
                rest.append((expr, length, where))
            elif not unknown:
                if evaluate(expr, values) != length:
                    raise InfeasibleError(
                        f"{where}: {describe(expr)} is {evaluate(expr, values)} "
                        f"but {length} positions are left"
                    )
            else:
                leaf = unknown.pop()
                solved = _solve_one(expr, leaf, length, values, old[leaf])
                if solved is None:
                    raise InfeasibleError(
                        f"{where}: no value of {describe(leaf)} makes {describe(expr)} equal to "
                        f"the {length} positions that are left"
                    )
                values[leaf] = solved
        if len(rest) == len(pending):
            # Only products of unknowns are left: keep the first unknown as it was.
            leaf = next(leaf for leaf in leaves(rest[0][0]) if leaf not in values)
            values[leaf] = old[leaf]
        pending = rest
    return {
        (expr[1], expr[2]): value
        for expr, value in values.items()
        if expr[0] == "attr" and value != old[expr]
    }


def _solve_one(
    expr: Expr, leaf: Expr, length: int, values: dict[Expr, int], old: int
) -> int | None:
    """Return the value of ``leaf`` for which ``expr`` is ``length``, or None."""

    def is_solution(value: int) -> bool:
        try:
            return value >= 0 and evaluate(expr, {**values, leaf: value}) == length
        except ZeroDivisionError:
            return False

    if is_solution(old):
        return old
    inverse = _invert(expr, leaf, length, values)
    if inverse is not None:
        return inverse if is_solution(inverse) else None
    # It occurs twice, or in a remainder: try every smaller value, the closest first.
    return next((value for value in range(min(old, 65536), 0, -1) if is_solution(value)), None)


def _invert(expr: Expr, leaf: Expr, target: int, values: Mapping[Expr, int]) -> int | None:
    """Undo the arithmetic around ``leaf``; None if it occurs twice or in a remainder."""
    if expr == leaf:
        return target
    symbol, left, right = expr
    inside_left, inside_right = leaf in leaves(left), leaf in leaves(right)
    if inside_left == inside_right or symbol == "%":
        return None
    known = evaluate(right if inside_left else left, values)
    inner = left if inside_left else right
    if symbol == "+":
        outer = target - known
    elif symbol == "-":
        outer = target + known if inside_left else known - target
    elif symbol == "*":
        outer = target // known if known else 0
    elif inside_left:
        outer = target * known
    else:
        outer = known // target if target else known + 1
    return _invert(inner, leaf, outer, values)


def code_line(*, passing_calls: bool = False) -> str:
    """Return the file and line of the model's running code, such as ``modeling_llama.py:98``.

    Skips frames of this package and PyTorch; with ``passing_calls`` also those of ``__call__``.
    """
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_filename
        calls = passing_calls and frame.f_code.co_name == "__call__"
        if not (calls or name.startswith(_NOT_THE_MODELS)):
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "PyTorch"


_NOT_THE_MODELS = (
    f"{Path(__file__).resolve().parent.parent}{os.sep}",
    f"{Path(torch.__file__).resolve().parent}{os.sep}",
    contextlib.__file__,
    functools.__file__,
    "<frozen",
)
