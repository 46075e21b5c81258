"""What many removals of one model leave: parameters, exactly, or another cost, by prices.

`llm_pruner.surgery.removal.count_parameters` gives the same numbers; it sorts every position of
every axis each time, which is too slow for a search.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llm_pruner.types import Discovery, IntArray, Removal


@dataclass(frozen=True)
class Cost:
    """What a target counts."""

    total: int
    left: Callable[[Removal], int]
    dense: int
    unit: str = "parameters"

    @classmethod
    def of_parameters(cls, discovery: Discovery, dense: int) -> Cost:
        """Count parameters, of which the dense model has ``dense``."""
        counter = ParameterCounter(discovery)
        return cls(counter.total, counter.count, dense)

    def freed(self, name: str, units: IntArray) -> IntArray:
        """Return how much each of some units of a group frees if it goes alone, shape (units,)."""
        left = [self.left({name: unit}) for unit in units.reshape(-1, 1)]
        return self.total - np.array(left, dtype=np.int64)


class ParameterCounter:
    """Counts the parameters that removals leave, tied weights once.

    An axis that one group prunes loses units * k positions. Only where several groups prune the
    same axis (heads and head_dim), or units share positions, are the positions looked at.
    """

    def __init__(self, discovery: Discovery) -> None:
        self._shapes = discovery.shapes
        self.total = sum(math.prod(shape) for shape in discovery.shapes.values())
        self._modules = {g.name: g.modules for g in discovery.groups if g.modules}
        found: dict[tuple[str, int], dict[str, list[IntArray]]] = {}
        self._touches: dict[str, set[str]] = {}
        for group in discovery.groups:
            for member in group.members:
                if member.tensor in discovery.shapes:
                    axis = found.setdefault((member.tensor, member.dim), {})
                    axis.setdefault(group.name, []).append(member.index)
                    self._touches.setdefault(group.name, set()).add(member.tensor)
        # Tensor -> of each axis that is pruned, group -> positions of its units, (units, k).
        self._axes: dict[str, dict[int, dict[str, IntArray]]] = {}
        self._overlapping: set[tuple[str, int, str]] = set()
        for (tensor, dim), owners in found.items():
            indices = {name: np.hstack(parts) for name, parts in owners.items()}
            self._axes.setdefault(tensor, {})[dim] = indices
            for name, index in indices.items():
                if index.size and np.bincount(index.ravel()).max() > 1:
                    self._overlapping.add((tensor, dim, name))

    def count(self, removal: Removal) -> int:
        """Return the number of parameters left; units need not be sorted."""
        removal = {name: units for name, units in removal.items() if len(units)}
        whole = tuple(
            f"{modules[int(unit)]}."
            for name, modules in self._modules.items()
            for unit in removal.get(name, ())
        )
        gone = {tensor for tensor in self._shapes if tensor.startswith(whole)} if whole else set()
        left: int = self.total - sum(math.prod(self._shapes[tensor]) for tensor in gone)
        touched = set().union(*(self._touches.get(name, set()) for name in removal)) - gone
        for tensor in touched:
            shape = list(self._shapes[tensor])
            dense = math.prod(shape)
            for dim in self._axes[tensor]:
                shape[dim] -= self._deleted(tensor, dim, removal)
            left -= dense - math.prod(shape)
        return left

    def _deleted(self, tensor: str, dim: int, removal: Removal) -> int:
        indices = self._axes[tensor][dim]
        names = [name for name in indices if name in removal]
        if not names:
            return 0
        if len(names) == 1 and (tensor, dim, names[0]) not in self._overlapping:
            return len(removal[names[0]]) * indices[names[0]].shape[1]
        positions = np.concatenate([indices[name][removal[name]].ravel() for name in names])
        return int(np.count_nonzero(np.bincount(positions)))
