"""Where the integers come from that size an axis, and what they become after a removal.

During a trace every integer attribute of the model is a ``TracedInt``: an int that remembers the
attribute, or the tensor axis, that it was read from, and the arithmetic since. When such an integer
sizes an axis (in ``view``, ``split``, a slice ...) an ``Equation`` is recorded. After a removal the
lengths are known, and the equations are solved for the attributes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from llm_pruner.errors import InfeasibleError
from llm_pruner.types import IntArray

Expr: TypeAlias = tuple[Any, ...]
"""('const', value) | ('attr', module, name) | ('len', axis) | (operator, left, right)"""

Attribute: TypeAlias = tuple[str, str]
"""(module, attribute name)"""

_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


class TracedInt(int):
    """An int with its origin; behaves as a plain int everywhere.

    Arithmetic with a float on the *left* (``1.0 / size``) and ``math.log`` read the value without
    asking this class, so such a use as a number stays unseen here; the twin of ``verification``
    catches it.
    """

    expr: Expr
    on_value: Callable[[Expr], None]

    @classmethod
    def of(cls, value: int, expr: Expr, on_value: Callable[[Expr], None]) -> TracedInt:
        """Return ``value`` with the origin ``expr``; ``on_value`` hears of uses as a number."""
        traced = cls(value)
        traced.expr = expr
        traced.on_value = on_value
        return traced

    def _binary(self, symbol: str, other: object, *, swap: bool = False) -> Any:
        if isinstance(other, int) and not isinstance(other, bool):
            left, right = (other, self) if swap else (self, other)
            try:
                value = _OPERATORS[symbol](int(left), int(right))
            except ZeroDivisionError:
                return NotImplemented
            return TracedInt.of(value, (symbol, expr_of(left), expr_of(right)), self.on_value)
        if isinstance(other, float):
            self.on_value(self.expr)
            left_number, right_number = (other, int(self)) if swap else (int(self), other)
            return _OPERATORS[symbol](left_number, right_number)  # type: ignore[arg-type]
        return NotImplemented

    def __add__(self, other: object) -> Any:
        return self._binary("+", other)

    def __radd__(self, other: object) -> Any:
        return self._binary("+", other, swap=True)

    def __sub__(self, other: object) -> Any:
        return self._binary("-", other)

    def __rsub__(self, other: object) -> Any:
        return self._binary("-", other, swap=True)

    def __mul__(self, other: object) -> Any:
        return self._binary("*", other)

    def __rmul__(self, other: object) -> Any:
        return self._binary("*", other, swap=True)

    def __floordiv__(self, other: object) -> Any:
        return self._binary("//", other)

    def __rfloordiv__(self, other: object) -> Any:
        return self._binary("//", other, swap=True)

    def __mod__(self, other: object) -> Any:
        return self._binary("%", other)

    def __rmod__(self, other: object) -> Any:
        return self._binary("%", other, swap=True)

    def __divmod__(self, other: object) -> Any:
        return self // other, self % other

    def __neg__(self) -> Any:
        return self._binary("-", 0, swap=True)

    def __truediv__(self, other: object) -> Any:
        self.on_value(self.expr)
        return int(self) / (int(other) if isinstance(other, int) else other)  # type: ignore[operator]

    def __rtruediv__(self, other: object) -> Any:
        self.on_value(self.expr)
        return other / int(self)  # type: ignore[operator]

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        self.on_value(self.expr)
        return pow(int(self), other, modulo)

    def __rpow__(self, other: Any, modulo: Any = None) -> Any:
        self.on_value(self.expr)
        return pow(other, int(self), modulo)

    def __float__(self) -> float:
        self.on_value(self.expr)
        return float(int(self))

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return int, (int(self),)

    def __hash__(self) -> int:
        return hash(int(self))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TracedInt) and int(self) == int(other) and self.expr != other.expr:
            # Code that insists on it will do so after a removal.
            self.on_value(("==", self.expr, other.expr))
        return int(self) == other

    def __ne__(self, other: object) -> bool:
        if isinstance(other, TracedInt):
            return not self == other
        return int(self) != other

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        for value in inputs:
            if isinstance(value, TracedInt):
                value.on_value(value.expr)
        plain = [int(value) if isinstance(value, TracedInt) else value for value in inputs]
        return getattr(ufunc, method)(*plain, **kwargs)


def expr_of(value: int) -> Expr:
    """Return the origin of an integer; a plain int is a constant."""
    return value.expr if isinstance(value, TracedInt) else ("const", int(value))


def leaves(expr: Expr) -> Iterator[Expr]:
    """Yield the attributes and axes that an expression reads."""
    if expr[0] in ("attr", "len"):
        yield expr
    elif expr[0] in _OPERATORS:
        yield from leaves(expr[1])
        yield from leaves(expr[2])


def evaluate(expr: Expr, values: Mapping[Expr, int]) -> int:
    """Return the value of an expression; KeyError if a leaf has none."""
    if expr[0] == "const":
        return int(expr[1])
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
    """Return the attributes that must change, with their new values.

    Args:
        equations: (expression, length of the axis after the removal, where it was seen).
        old: value of every attribute in the dense model.
        lengths: length of every axis leaf after the removal.

    Raises:
        InfeasibleError: no assignment of the attributes satisfies all equations.
    """
    values: dict[Expr, int] = dict(lengths)
    pending = list(equations)
    # Single attributes settle first: the composite sizes that contain them follow.
    pending.sort(key=lambda equation: len(set(leaves(equation[0]))))
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
    # The attribute occurs twice, or in a remainder: try every smaller value, the closest first.
    return next((value for value in range(min(old, 65536), 0, -1) if is_solution(value)), None)


def _invert(expr: Expr, leaf: Expr, target: int, values: Mapping[Expr, int]) -> int | None:
    """Undo the arithmetic around ``leaf``, which must occur once; quotients without remainder."""
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
