"""Where the atoms of a trace lie, and which of them are units of one group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_pruner.tracing.atoms import Atoms
from llm_pruner.tracing.trace import Axes
from llm_pruner.types import IntArray


class Runs(NamedTuple):
    """Where atoms lie: one run for each pair of an atom and an axis, sorted by both."""

    atoms: IntArray  # each once; an atom's place here is its number
    axes: IntArray  # by run: number of the tensor * 16 + dim
    counts: IntArray  # by run: number of positions
    starts: IntArray  # by run: where these begin in ``positions``
    heads: IntArray  # by number of an atom: its first run
    positions: IntArray  # along the axes

    @classmethod
    def of(cls, atoms: Atoms, tensors: Sequence[Axes]) -> Runs:
        """Return the runs of the atoms on all axes of these tensors."""
        parts = [np.zeros((3, 0), dtype=np.int64)]
        for number, axes in enumerate(tensors):
            for dim, rows in enumerate(axes):
                resolved = atoms.resolve(rows)
                place, column = np.nonzero(resolved)
                axis = np.full(len(place), number * 16 + dim, dtype=np.int64)
                parts.append(np.stack([resolved[place, column], axis, place]))
        # Within an atom, axes and positions are in order already.
        every = np.concatenate(parts, axis=1)
        found, on, positions = every[:, np.argsort(every[0], kind="stable")]
        new = (np.diff(found, prepend=-1) != 0) | (np.diff(on, prepend=-1) != 0)
        starts = np.flatnonzero(new)
        heads = np.flatnonzero(np.diff(found[starts], prepend=-1))
        counts = np.diff(starts, append=len(found))
        return cls(found[starts][heads], on[starts], counts, starts, heads, positions)

    def positions_of(self, places: IntArray, offset: int = 0) -> IntArray:
        """Return the positions of similar atoms on one of their axes, shape (atoms, count)."""
        runs = self.heads[places] + offset
        return self.positions[self.starts[runs][:, None] + np.arange(self.counts[runs[0]])]

    def alike(self, flags: Sequence[np.ndarray[Any, np.dtype[np.bool_]]]) -> list[IntArray]:
        """Return the sets of atoms with equal counts on equal axes, and with equal flags."""
        if not self.atoms.size:
            return []
        signature = np.add.reduceat(_hash(self.axes, self.counts), self.heads)
        for bit, flag in enumerate(flags):
            known = flag[self.atoms].astype(np.int64)
            signature = signature + _hash(np.full(len(known), -1 - bit), known)
        by_signature: dict[int, list[int]] = defaultdict(list)
        for place, value in enumerate(signature.tolist()):
            by_signature[value].append(place)
        return [np.array(places) for places in by_signature.values()]

    def factors(self, places: IntArray) -> list[IntArray]:
        """Divide atoms with equal counts on equal axes into the factors of a product.

        The atoms of both axes of a product (two groups of two experts) may have equal counts. Those
        of one factor never meet at a position; each meets all atoms of the other factor.
        """
        index = self.positions_of(places)
        if len(np.unique(index)) == index.size:
            return [places]
        there = np.zeros((len(places), int(index.max()) + 1), dtype=bool)
        np.put_along_axis(there, index, values=True, axis=1)
        meets = (there.astype(np.int64) @ there.T.astype(np.int64)) > 0
        parts: list[IntArray] = []
        left = np.arange(len(places))
        while left.size:
            part = left[:1]
            while True:
                grown = left[~meets[np.ix_(left, part)].all(axis=1) | np.isin(left, part)]
                if len(grown) == len(part):
                    break
                part = grown
            parts.append(places[part])
            left = np.setdiff1d(left, part)
        return parts


def _hash(axes: IntArray, counts: IntArray) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Hash (axis, count) pairs to 64 bits (splitmix64), to be summed over the pairs of an atom."""
    with np.errstate(over="ignore"):
        x = axes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + counts.astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
