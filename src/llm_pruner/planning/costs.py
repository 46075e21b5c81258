"""What many removals of one model leave: parameters, exactly, or another cost, by prices.

`llm_pruner.surgery.removal.count_parameters` gives the same numbers; it sorts every position of
every axis each time, which is too slow for a search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from llm_pruner.types import Discovery, IntArray, Removal


@dataclass(frozen=True)
class Cost:
    """What a target counts.

    Attributes:
        total: the cost of the model as it is.
        left: removal -> the cost that it leaves; units need not be sorted.
        dense: the cost of the dense model.
        unit: what it is, in words, such as ``parameters``.
    """

    total: int
    left: Callable[[Removal], int]
    dense: int
    unit: str = "parameters"

    @classmethod
    def of_parameters(cls, discovery: Discovery, dense: int) -> Cost:
        """Count parameters, of which the dense model has ``dense``."""
        counter = ParameterCounter(discovery)
        return cls(counter.total, counter.count, dense)

    @classmethod
    def by_unit(cls, total: int, prices: Mapping[str, float], dense: int, unit: str) -> Cost:
        """Count what each unit of a group adds the same to, whatever else is removed.

        Args:
            prices: group -> cost of one unit; groups that are not named cost nothing.
        """

        def left(removal: Removal) -> int:
            gone = sum(prices.get(name, 0.0) * len(units) for name, units in removal.items())
            return total - round(gone)

        return cls(total, left, dense, unit)


@dataclass(frozen=True)
class _Part:
    """The positions of one axis that the units of one group own."""

    group: str
    index: IntArray  # (units, k)
    disjoint: bool  # no position belongs to two units


class ParameterCounter:
    """Counts the parameters that removals leave, tied weights once.

    An axis that one group prunes loses units * k positions. Only where several groups prune the
    same axis (heads and head_dim) are the positions themselves looked at.
    """

    def __init__(self, discovery: Discovery) -> None:
        self._shapes = discovery.shapes
        self._sizes = {group.name: group.size for group in discovery.groups}
        self.total = sum(math.prod(shape) for shape in discovery.shapes.values())
        self._modules = {g.name: g.modules for g in discovery.groups if g.modules}
        self._inside: dict[str, tuple[str, ...]] = {}
        for module in {name for names in self._modules.values() for name in names}:
            prefix = f"{module}."
            self._inside[module] = tuple(n for n in discovery.shapes if n.startswith(prefix))
        found: dict[tuple[str, int], dict[str, list[IntArray]]] = {}
        for group in discovery.groups:
            for member in group.members:
                if member.tensor in discovery.shapes:
                    axis = found.setdefault((member.tensor, member.dim), {})
                    axis.setdefault(group.name, []).append(member.index)
        self._axes: dict[str, list[tuple[int, list[_Part]]]] = {}
        self._touches: dict[str, set[str]] = {}
        for (tensor, dim), owners in found.items():
            parts = [_part(name, indices) for name, indices in owners.items()]
            self._axes.setdefault(tensor, []).append((dim, parts))
            for part in parts:
                self._touches.setdefault(part.group, set()).add(tensor)

    def count(self, removal: Removal) -> int:
        """Return the number of parameters left; units need not be sorted."""
        removal = {name: units for name, units in removal.items() if len(units)}
        gone: set[str] = set()
        for name in removal:
            for unit in removal[name] if name in self._modules else ():
                gone.update(self._inside[self._modules[name][int(unit)]])
        left: int = self.total - sum(math.prod(self._shapes[tensor]) for tensor in gone)
        touched = set().union(*(self._touches.get(name, set()) for name in removal)) - gone
        for tensor in touched:
            shape = list(self._shapes[tensor])
            dense = math.prod(shape)
            for dim, parts in self._axes[tensor]:
                shape[dim] -= self._deleted([p for p in parts if p.group in removal], removal)
            left -= dense - math.prod(shape)
        return left

    @staticmethod
    def _deleted(parts: list[_Part], removal: Removal) -> int:
        if not parts:
            return 0
        if len(parts) == 1 and parts[0].disjoint:
            return len(removal[parts[0].group]) * parts[0].index.shape[1]
        positions = [part.index[removal[part.group]].ravel() for part in parts]
        mask = np.zeros(1 + max(int(p.max(initial=0)) for p in positions), dtype=bool)
        for place in positions:
            mask[place] = True
        return int(np.count_nonzero(mask))


def _part(group: str, indices: list[IntArray]) -> _Part:
    index = indices[0] if len(indices) == 1 else np.hstack(indices)
    seen = np.bincount(index.ravel()) if index.size else np.zeros(0, dtype=np.int64)
    return _Part(group, index, disjoint=bool(np.all(seen <= 1)))
