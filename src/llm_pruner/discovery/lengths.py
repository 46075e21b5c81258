"""The sizes that a model's code reads, after a removal.

``SizeSystem`` solves the equations of a trace for the module attributes after a removal, and tells
which groups must shrink together for a solution to exist.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_pruner.errors import InfeasibleError
from llm_pruner.tracing.scenes import Scene
from llm_pruner.tracing.sizes import Attribute, Expr, describe, evaluate, leaves, solve
from llm_pruner.tracing.trace import Trace
from llm_pruner.types import IntArray, Removal

Deleted = npt.NDArray[np.bool_]
Form = dict[Any, Fraction]
"""The loss of a size as a sum: number of a group, or an attribute -> factor of its loss."""


class SizeSystem:
    """Lengths of the axes after a removal, and the attributes that follow."""

    def __init__(self, trace: Trace) -> None:
        self._atoms = trace.atoms
        self._old = trace.values
        self._ragged = [
            (
                trace.atoms.resolve(r.outer),
                trace.atoms.find(r.pairs),
                trace.atoms.find(r.inner)[:, 0],
            )
            for r in trace.ragged
            # Copies that are tied to their axis follow its own atoms.
            if trace.atoms.resolve(r.inner).size
            and (trace.atoms.find(r.pairs) != trace.atoms.find(r.inner)[:, 0]).any()
        ]
        self._axes: dict[bytes, int] = {}
        self._rows: list[IntArray] = []
        self._lengths = [self._axis(rows) for rows in trace.lengths]
        seen: dict[tuple[Expr, int], str] = {}
        for equation in trace.equations:
            seen.setdefault((equation.expr, self._axis(equation.rows)), equation.where)
        self.equations = [(expr, axis, where) for (expr, axis), where in seen.items()]
        # Comparisons are numbered after the equations.
        self.checks = list(dict(trace.checks).items())
        self._leaves = [
            set(leaves(expr)) for expr in (*(e for e, _, _ in self.equations), *dict(self.checks))
        ]
        self._by_axis: dict[int, list[int]] = defaultdict(list)
        self._by_leaf: dict[Expr, list[int]] = defaultdict(list)
        for number, (_, axis, _) in enumerate(self.equations):
            self._by_axis[axis].append(number)
        for number, read in enumerate(self._leaves):
            for leaf in read:
                self._by_leaf[leaf].append(number)
        self._lengths_of_axis: dict[int, list[int]] = defaultdict(list)
        for number, axis in enumerate(self._lengths):
            self._lengths_of_axis[axis].append(number)
        self._axes_of_atom = _Lookup(self._rows)
        self._ragged_of_atom = _Lookup([pairs for _, pairs, _ in self._ragged])

    def _axis(self, rows: IntArray) -> int:
        resolved = self._atoms.resolve(rows)
        key = resolved.tobytes() + b"|" + repr(resolved.shape).encode()
        if key not in self._axes:
            self._axes[key] = len(self._rows)
            self._rows.append(resolved)
        return self._axes[key]

    # ---------------------------------------------------------------- solving

    def with_replicas(self, deleted: Deleted) -> Deleted:
        """Return ``deleted`` with the expanded axes cut to the number of replicas left."""
        deleted = deleted.copy()
        for number in self._ragged_of_atom.where(deleted):
            outer, pairs, inner = self._ragged[number]
            alive = ~deleted[outer].any(axis=1)
            kept = (~deleted[pairs]).sum(axis=1)[alive]
            if kept.size == 0:
                continue
            if (kept != kept[0]).any():
                raise InfeasibleError(
                    "key-value groups of one layer keep different numbers of query heads"
                )
            deleted[inner[int(kept[0]) :]] = True
        return deleted

    def attributes(self, deleted: Deleted, touched: set[int]) -> dict[Attribute, int]:
        """Return the attributes that change, with their new values.

        ``deleted`` is by atom; ``touched`` numbers the equations and comparisons to satisfy.
        InfeasibleError: the model's code cannot express the sizes that are left.
        """
        deleted = self.with_replicas(deleted)
        left = {}

        def length(axis: int) -> int:
            if axis not in left:
                rows = self._rows[axis]
                left[axis] = int(len(rows) - deleted[rows].any(axis=1).sum())
            return left[axis]

        chosen = sorted(touched)
        count = len(self.equations)
        system = [
            (expr, length(axis), where)
            for expr, axis, where in (self.equations[i] for i in chosen if i < count)
        ]
        lengths = {
            leaf: length(self._lengths[leaf[1]])
            for number in chosen
            for leaf in self._leaves[number]
            if leaf[0] == "len"
        }
        found = solve(system, self._old, lengths)
        new = {**self._old, **lengths, **{("attr", *name): value for name, value in found.items()}}
        for expr, where in (self.checks[number - count] for number in chosen if number >= count):
            if evaluate(expr, self._old) != evaluate(expr, new):
                symbol, left, right = expr
                raise InfeasibleError(
                    f"the code asks whether {describe(left)} {symbol} {describe(right)} ({where}), "
                    "and the answer would change"
                )
        return found

    def reading_only(self, stands: Callable[[str], bool]) -> set[int]:
        """Return the equations and comparisons that only read attributes of modules that stay."""
        return {
            number
            for number, read in enumerate(self._leaves)
            if all(leaf[0] != "attr" or stands(leaf[1]) for leaf in read)
        }

    def equations_of(self, atoms: IntArray) -> set[int]:
        """Return the equations that the deletion of these atoms can touch."""
        expanded = self._ragged_of_atom(atoms)
        if expanded:
            atoms = np.concatenate([atoms, *(self._ragged[number][2] for number in expanded)])
        axes = self._axes_of_atom(atoms)
        found = {number for axis in axes for number in self._by_axis[axis]}
        changed: set[Expr] = {
            leaf for number in found for leaf in self._leaves[number] if leaf[0] == "attr"
        }
        changed |= {("len", number) for axis in axes for number in self._lengths_of_axis[axis]}
        return found | {number for leaf in changed for number in self._by_leaf[leaf]}

    # -------------------------------------------------------------- companions

    def constraints(self, group_of: IntArray, group_sizes: Sequence[int]) -> list[tuple[Form, str]]:
        """Return linear equations between the numbers of units that groups lose: sum of form = 0.

        ``group_of``: group number of every atom, -1 for none; ``group_sizes`` in units. Products of
        axes give none: they follow from their factors.
        """
        forms = self._forms(group_of, group_sizes)
        by_attribute: dict[Expr, list[tuple[Form, str]]] = defaultdict(list)
        result: list[tuple[Form, str]] = []
        for expr, axis, where in self.equations:
            lost, wanted = forms[axis], self._linear(expr, forms)
            if lost is None or wanted is None:
                continue
            form = _subtract(lost, wanted)
            attributes = [key for key in form if isinstance(key, tuple)]
            if len(attributes) == 1:
                leaf = attributes[0]
                factor = -form.pop(leaf)
                form = {group: value / factor for group, value in form.items()}
                by_attribute[leaf].append((form, f"{describe(leaf)} in {where}"))
            elif form and not attributes:
                result.append((form, f"{describe(expr)} in {where}"))
        for uses in by_attribute.values():
            reference = uses[0][0]
            for form, where in uses[1:]:
                difference = _subtract(form, reference)
                if difference:
                    result.append((difference, where))
        return result

    def _forms(self, group_of: IntArray, group_sizes: Sequence[int]) -> list[Form | None]:
        replica_of: dict[int, tuple[int, int]] = {}
        for _, pairs, inner in self._ragged:
            groups = np.unique(group_of[pairs])
            if len(groups) == 1 and groups[0] >= 0:
                for atom in inner:
                    replica_of[int(atom)] = (int(groups[0]), pairs.shape[0])
        forms: list[Form | None] = []
        for rows in self._rows:
            if ((rows > 0).sum(axis=1) > 1).any():
                forms.append(None)
                continue
            flat = rows[rows > 0]
            groups, counts = np.unique(group_of[flat], return_counts=True)
            form: Form = {}
            for group, count in zip(groups.tolist(), counts.tolist(), strict=True):
                if group >= 0:
                    form[group] = Fraction(count, group_sizes[group])
                else:
                    owners = {replica_of.get(int(a)) for a in flat[group_of[flat] < 0]}
                    owner = owners.pop() if len(owners) == 1 else None
                    if owner is not None:
                        form[owner[0]] = form.get(owner[0], Fraction(0)) + Fraction(1, owner[1])
            forms.append(form)
        return forms

    def _linear(self, expr: Expr, forms: list[Form | None]) -> Form | None:
        """Return what an expression loses; None if it is no sum of multiples."""
        kind = expr[0]
        if kind == "const":
            return {}
        if kind == "attr":
            return {expr: Fraction(1)}
        if kind == "len":
            return forms[self._lengths[expr[1]]]
        left, right = (self._linear(side, forms) for side in expr[1:])
        if left is None or right is None:
            return None
        if kind in ("+", "-"):
            return _subtract(left, right, Fraction(-1 if kind == "+" else 1))
        first, second = (side[1] if side[0] == "const" else None for side in expr[1:])
        if kind == "*" and second is not None:
            return _subtract({}, left, Fraction(-second))
        if kind == "*" and first is not None:
            return _subtract({}, right, Fraction(-first))
        return _subtract({}, left, Fraction(-1, second)) if kind == "//" and second else None


class _Lookup:
    """In which of many arrays of atoms an atom occurs."""

    def __init__(self, arrays: Sequence[IntArray]) -> None:
        counts = [array.size for array in arrays]
        owners = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        atoms = np.concatenate([np.zeros(0, np.int64), *(array.ravel() for array in arrays)])
        owners, atoms = owners[atoms > 0], atoms[atoms > 0]
        order = np.argsort(atoms, kind="stable")
        self._atoms, self._owners = atoms[order], owners[order]

    def __call__(self, atoms: IntArray) -> list[int]:
        """Return the numbers of the arrays that hold any of the atoms."""
        atoms = np.unique(atoms)
        first = np.searchsorted(self._atoms, atoms)
        counts = np.searchsorted(self._atoms, atoms, side="right") - first
        places = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        return np.unique(self._owners[places]).tolist()

    def where(self, flags: Deleted) -> list[int]:
        """Return the numbers of the arrays that hold any atom whose flag is set."""
        return np.unique(self._owners[flags[self._atoms]]).tolist()


def _subtract(left: Form, right: Form, factor: Fraction = Fraction(1)) -> Form:
    """Return left - factor * right without zeros."""
    result = dict(left)
    for group, value in right.items():
        result[group] = result.get(group, Fraction(0)) - factor * value
    return {group: value for group, value in result.items() if value}


@dataclass(frozen=True)
class Graph:
    """A settled trace, and the units that groups have in it.

    Attributes:
        unit_atoms: group name -> representative atom of each unit.
        scenes: the ways in which the model was run.
        left_out: names of those that it could not be run in.
        own_numbers: (module list, module inside a layer, attribute) of layer numbers that code
            calculates with, so a layer keeps its own.
    """

    trace: Trace
    system: SizeSystem
    unit_atoms: Mapping[str, IntArray]
    scenes: tuple[Scene, ...]
    left_out: tuple[str, ...] = ()
    own_numbers: frozenset[tuple[str, str, str]] = frozenset()

    def deleted(self, removal: Removal) -> Deleted:
        """Return by atom whether the removal deletes it."""
        flags = np.zeros(len(self.trace.atoms), dtype=bool)
        for name, units in removal.items():
            if name in self.unit_atoms and len(units):
                flags[self.unit_atoms[name][units]] = True
        return flags


def reduce_constraints(
    constraints: list[tuple[Form, str]],
) -> tuple[dict[int, tuple[int, Fraction]], dict[int, str]]:
    """Solve the constraints for ratios between pairs of groups.

    Returns (follower -> (leader, units the follower loses per unit of the leader), group -> reason
    it cannot lose any unit). In a relation of three or more groups (rotated, unrotated and value
    channels of a head), groups that occur in most relations are fixed until pairs are left.
    """
    why: dict[int, str] = {}
    for form, where in constraints:
        for group in form:
            why.setdefault(group, where)
    stuck: dict[int, str] = {}
    forms = [form for form, _ in constraints]
    while True:
        rows = _eliminate([*({group: Fraction(1)} for group in stuck), *forms])
        uses = Counter(group for _, row in rows if len(row) > 2 for group in row)
        if not uses:
            break
        fixed = min(uses, key=lambda group: (-uses[group], group))
        stuck[fixed] = f"it stays whole so that others of its size can shrink ({why[fixed]})"
    follows: dict[int, tuple[int, Fraction]] = {}
    for pivot, row in rows:
        others = [group for group in row if group != pivot]
        if others and row[others[0]] < 0:
            follows[pivot] = (others[0], -row[others[0]])
            continue
        for group in row:
            stuck.setdefault(
                group, f"its size is bound to others that cannot follow ({why[group]})"
            )
    for _ in range(2):  # from a follower to its leader, and from it to the others
        for follower, (leader, _) in follows.items():
            for one, other in ((follower, leader), (leader, follower)):
                if one in stuck:
                    stuck.setdefault(other, stuck[one])
    return follows, stuck


def _eliminate(forms: list[Form]) -> list[tuple[int, Form]]:
    """Return (pivot, row) in reduced echelon form; every pivot has the factor 1."""
    rows: list[tuple[int, Form]] = []
    for form in forms:
        for pivot, row in rows:
            if pivot in form:
                form = _subtract(form, row, form[pivot])
        if not form:
            continue
        new = max(form)
        form = {group: value / form[new] for group, value in form.items()}
        rows = [
            (pivot, _subtract(row, form, row[new]) if new in row else row) for pivot, row in rows
        ]
        rows.append((new, form))
    return rows
