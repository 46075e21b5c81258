"""Deletion events ("atoms"), and which of them must happen together.

*Rows* describe an axis of a tensor: an int64 array of shape (n, k), the atoms of each position,
padded with 0. A position is deleted with any of its atoms; a row without atoms is never deleted
(frozen). Unifying two axes states that position i of one is deleted exactly when position i of the
other is. Everything is arrays and union-find; nothing loops over channels.

``unify`` drops common atoms and then goes row by row: one atom and one become one class; one is
*substituted* by several (a projection's row becomes {head, channel}); several and as many are
paired by column; an atom without a partner is frozen. Both sides then agree whatever is deleted;
some freedom may be lost.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llm_pruner.types import IntArray

NO_ATOM = 0

WEAK_REASONS = frozenset({"the batch", "the sequence", "a constant in the code"})
"""True of some axis in nearly every product, so any other reason says more."""


class Atoms:
    """Union-find over atoms with substitution and freezing."""

    def __init__(self) -> None:
        self._size = 1
        self._parent: IntArray = np.zeros(1024, dtype=np.int64)
        self._substitute: IntArray = np.full(1024, -1, dtype=np.int64)
        self._frozen: IntArray = np.zeros(1024, dtype=np.int64)
        self._replica = np.zeros(1024, dtype=bool)
        self._table: IntArray = np.zeros((0, 2), dtype=np.int64)
        self._table_size = 0
        self._reasons: dict[str, int] = {"": 0}

    def __len__(self) -> int:
        return self._size

    def fresh(self, count: int, *, replica: bool = False) -> IntArray:
        """Return rows (count, 1) of new atoms.

        The positions of a *replica* axis, from ``expand``, all hold the same values, so any of them
        may be removed (see ``is_replica``).
        """
        start, stop = self._size, self._size + count
        if stop > len(self._parent):
            room = len(self._parent) + max(1024, len(self._parent) // 8)
            more = (0, max(stop, room) - len(self._parent))
            self._parent, self._frozen = np.pad(self._parent, more), np.pad(self._frozen, more)
            self._substitute = np.pad(self._substitute, more, constant_values=-1)
            self._replica = np.pad(self._replica, more)
        self._parent[start:stop] = np.arange(start, stop)
        self._replica[start:stop] = replica
        self._size = stop
        return np.arange(start, stop, dtype=np.int64)[:, None]

    # ---------------------------------------------------------------- reading

    def find(self, atoms: IntArray) -> IntArray:
        """Return the representative of each atom's class."""
        parent = self._parent
        roots = parent[atoms]
        above = parent[roots]
        if not _any(above != roots):
            return roots
        while _any(above != roots):
            roots, above = above, parent[above]
        parent[atoms] = roots
        parent[NO_ATOM] = NO_ATOM
        return roots

    def resolve(self, rows: IntArray) -> IntArray:
        """Return rows of live representatives: no frozen, substituted or repeated atoms."""
        rows = self.find(rows)
        if rows.size == 0:
            return np.zeros((len(rows), 0), dtype=np.int64)
        while rows.size:
            replaced = self._substitute[rows] >= 0
            if not _any(replaced):
                break
            columns = []
            for column in range(rows.shape[1]):
                hit = replaced[:, column]
                if not hit.any():
                    columns.append(rows[:, column : column + 1])
                    continue
                wide = np.zeros((len(rows), self._table.shape[1]), dtype=np.int64)
                wide[~hit, 0] = rows[~hit, column]
                wide[hit] = self._table[self._substitute[rows[hit, column]]]
                columns.append(wide)
            rows = self.find(np.concatenate(columns, axis=1))
        frozen = self._frozen[rows] > 0
        if _any(frozen):
            rows[frozen] = NO_ATOM
        if rows.shape[1] == 1:
            return rows if _any(rows) else rows[:, :0]
        for column in range(1, rows.shape[1]):
            repeated = (rows[:, :column] == rows[:, column : column + 1]).any(axis=1)
            rows[repeated, column] = NO_ATOM
        return rows[:, rows.any(axis=0)]

    def same(self, left: IntArray, right: IntArray) -> bool:
        """Whether the same atoms delete the same positions of two axes."""
        return np.array_equal(self.resolve(left), self.resolve(right))

    def reason(self, rows: IntArray) -> str | None:
        """Return why the first frozen atom among ``rows`` is frozen, or None."""
        return self.first_reason(self.frozen_in(rows))

    def frozen_in(self, rows: IntArray) -> IntArray:
        """Return the frozen atoms among ``rows`` and their substitutes."""
        pending = self.find(rows.ravel())
        found = [pending[:0]]
        while pending.size:
            found.append(pending[self._frozen[pending] > 0])
            inside = self._substitute[pending]
            pending = self.find(np.unique(self._table[inside[inside >= 0]]))
        return np.concatenate(found)

    def first_reason(self, frozen: IntArray) -> str | None:
        """Return why the first of these atoms is frozen, preferring strong reasons; or None."""
        known = [*self._reasons]
        reasons = [known[i] for i in dict.fromkeys(self._frozen[frozen].tolist())]
        strong = [reason for reason in reasons if reason not in WEAK_REASONS]
        return next(iter([*strong, *reasons]), None)

    def _why_tied(self, fixed: IntArray, live: IntArray) -> str:
        """Return why ``fixed`` cannot shrink, apart from what ``live`` holds as well."""
        frozen = self.frozen_in(fixed)
        cause = frozen[~np.isin(frozen, self.frozen_in(live))]
        reason = self.first_reason(cause) or self.first_reason(frozen)
        return reason or "tied to an axis that cannot shrink with it"

    def is_replica(self, rows: IntArray) -> bool:
        """Whether every position is one untouched atom of an expanded axis."""
        if rows.shape[1] != 1:
            return False
        flat = rows[:, 0]
        if not _all(self._replica[flat]) or not _all(flat):
            return False
        return _all((self.find(flat) == flat) & (self._frozen[flat] == 0))

    # ---------------------------------------------------------------- stating

    def freeze(self, rows: IntArray, reason: str) -> None:
        """State that no position of ``rows`` is ever deleted."""
        live = self.resolve(rows)
        flat = live[live > 0]
        if flat.size:
            self._frozen[flat] = self._reasons.setdefault(reason, len(self._reasons))

    def union(self, left: IntArray, right: IntArray) -> None:
        """Make one class of left[i] and right[i], for every i; the smaller id represents it."""
        self._replica[left] = False
        self._replica[right] = False
        while True:
            a, b = self.find(left), self.find(right)
            differ = a != b
            if not _any(differ):
                return
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            frozen = self._frozen[high]
            carried = (frozen > 0) & (self._frozen[low] == 0)
            self._frozen[low[carried]] = frozen[carried]
            np.minimum.at(self._parent, high, low)
            left, right = low, high

    def unify(self, left: IntArray, right: IntArray) -> IntArray:
        """State that positions of two axes are deleted together; return the resolved rows."""
        if len(left) != len(right):
            raise ValueError(f"cannot unify axes of {len(left)} and {len(right)} positions")
        if left is right:
            return left
        raw_left, raw_right = left, right
        left, right = self.find(left), self.find(right)
        if left.shape == right.shape and not _any(left != right):
            return raw_left
        while True:
            left, right = self.resolve(left), self.resolve(right)
            if left.shape == right.shape and not _any(left != right):
                return left
            a, b = _without_common(left, right)
            count_a, count_b = (a > 0).sum(axis=1), (b > 0).sum(axis=1)
            if not (_any(count_a) or _any(count_b)):
                return left if left.shape[1] <= right.shape[1] else right
            single = (count_a == 1) & (count_b == 1)
            if _any(single):
                self.union(a[single, 0], b[single, 0])
                continue
            alone_a, alone_b = (count_b == 0) & (count_a > 0), (count_a == 0) & (count_b > 0)
            if _any(alone_a) or _any(alone_b):
                self.freeze(a[alone_a], self._why_tied(raw_right[alone_a], raw_left[alone_a]))
                self.freeze(b[alone_b], self._why_tied(raw_left[alone_b], raw_right[alone_b]))
                continue
            for few, many, rows in (
                (a, b, (count_a == 1) & (count_b > 1)),
                (b, a, (count_b == 1) & (count_a > 1)),
            ):
                if _any(rows):
                    self._substitute_by(few[rows, 0], many[rows])
                    break
            else:
                self._pair_columns(a, b, count_a, count_b)

    def _substitute_by(self, atoms: IntArray, sets: IntArray) -> None:
        first, index = np.unique(atoms, return_index=True)
        sets = sets[index]
        # An atom that stands in another row's set must stay itself for this round.
        inside = np.isin(first, sets)
        if inside.all():
            self.freeze(first[:, None], "two views of one axis contradict each other")
            return
        first, sets = first[~inside], sets[~inside]
        width = max(self._table.shape[1], sets.shape[1])
        start = self._table_size
        if start + len(sets) > len(self._table) or width > self._table.shape[1]:
            more = max(start + len(sets), 2 * len(self._table)) - len(self._table)
            self._table = np.pad(self._table, ((0, more), (0, width - self._table.shape[1])))
        self._table[start : start + len(sets), : sets.shape[1]] = sets
        self._table_size = start + len(sets)
        self._substitute[first] = np.arange(start, start + len(sets))
        self._replica[sets] = False
        self._replica[first] = False

    def _pair_columns(self, a: IntArray, b: IntArray, count_a: IntArray, count_b: IntArray) -> None:
        uneven = count_a != count_b
        if uneven.any():
            why = "two views of one axis divide it differently"
            self.freeze(a[uneven], why)
            self.freeze(b[uneven], why)
            return
        arity = int(count_a.max())
        rows = count_a == arity
        a, b = a[rows][:, :arity], b[rows][:, :arity]
        left, right = list(range(arity)), list(range(arity))
        patterns = [_partition(b[:, column]) for column in range(arity)]
        pairs = []
        for column in range(arity):
            pattern = _partition(a[:, column])
            for other in right:
                if np.array_equal(pattern, patterns[other]):
                    pairs.append((column, other))
                    right.remove(other)
                    left.remove(column)
                    break
        for column, other in [*pairs, *zip(left, right, strict=True)]:
            self.union(a[:, column], b[:, other])


def _any(values: npt.NDArray[Any]) -> bool:
    """Whether any value is not zero; counting them is faster than ``any`` where there are few."""
    return bool(np.count_nonzero(values))


def _all(values: npt.NDArray[Any]) -> bool:
    return int(np.count_nonzero(values)) == values.size


def empty_rows(count: int) -> IntArray:
    """Return rows of an axis whose positions are never deleted."""
    return np.zeros((count, 0), dtype=np.int64)


def product_rows(outer: IntArray, inner: IntArray) -> IntArray:
    """Return rows of the merged axis: position (i, j) carries the atoms of both i and j."""
    return np.concatenate(
        [np.repeat(outer, len(inner), axis=0), np.tile(inner, (len(outer), 1))], axis=1
    )


def stack_rows(parts: list[IntArray]) -> IntArray:
    """Return rows of concatenated axes."""
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])


def _without_common(left: IntArray, right: IntArray) -> tuple[IntArray, IntArray]:
    """Drop the atoms that both rows hold, and move the rest to the front of each row."""
    left, right = left.copy(), right.copy()
    equal = (left[:, :, None] == right[:, None, :]) & (left[:, :, None] > 0)
    left[equal.any(axis=2)] = NO_ATOM
    right[equal.any(axis=1)] = NO_ATOM
    return _to_front(left), _to_front(right)


def _to_front(rows: IntArray) -> IntArray:
    order = np.argsort(rows == 0, axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1)


def _partition(column: IntArray) -> IntArray:
    """Number the values of a column by first appearance: equal arrays are equal partitions."""
    _, index, inverse = np.unique(column, return_index=True, return_inverse=True)
    rank = np.empty(len(index), dtype=np.int64)
    rank[np.argsort(index, kind="stable")] = np.arange(len(index))
    return rank[inverse]
