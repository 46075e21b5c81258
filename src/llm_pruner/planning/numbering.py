"""From the numbering of a model that was pruned already to that of the dense model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from llm_pruner.planning.constraints import dead_blocks, layer_numbers, parent_of, removed_layers
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.types import Discovery, Group, IntArray, Removal


@dataclass(frozen=True)
class Survivors:
    """What is left of a dense model after some steps.

    Attributes:
        groups: the groups of the dense model, by name.
        kept: dense group name -> dense units that are left, sorted; position i is unit i of the
            pruned model. Groups of layers that are gone are absent.
        layers: dense numbers of the decoder layers that are left; position i is layer i of the
            pruned model.
        parameters: number of parameters of the dense model.
    """

    groups: Mapping[str, Group]
    kept: Mapping[str, IntArray]
    layers: IntArray
    parameters: int

    @classmethod
    def dense(cls, discovery: Discovery) -> Survivors:
        """Start from the dense model, of which everything is left."""
        groups = {group.name: group for group in discovery.groups}
        return cls(
            groups=groups,
            kept={name: np.arange(group.size, dtype=np.int64) for name, group in groups.items()},
            layers=np.arange(count_layers(discovery.groups), dtype=np.int64),
            parameters=count_parameters(discovery),
        )

    def dense_name(self, name: str) -> str:
        """Return the dense name of a group: layers are renumbered once some are gone.

        Raises:
            KeyError: no group of the dense model is left under that name.
        """
        for dense in self.kept:
            if self._current_name(self.groups[dense]) == name:
                return dense
        raise KeyError(name)

    def dense_layer(self, layer: int) -> int:
        """Return the dense number of a decoder layer of the pruned model."""
        return int(self.layers[layer])

    def to_dense(self, removal: Removal) -> dict[str, IntArray]:
        """Return the same removal in the names and numbers of the dense model."""
        names = {self._current_name(self.groups[dense]): dense for dense in self.kept}
        return {names[name]: self.kept[names[name]][units] for name, units in removal.items()}

    def after(self, removal: Removal) -> Survivors:
        """Return what is left once ``removal``, in the numbering of the pruned model, is done."""
        lost = self.to_dense(removal)
        gone = removed_layers(self.groups, lost)
        kept: dict[str, IntArray] = {}
        for name, units in self.kept.items():
            group = self.groups[name]
            if group.layer in gone:
                continue
            if name in lost:
                units = np.setdiff1d(units, lost[name])
            if group.blocks is not None:
                units = units[~np.isin(group.blocks[units], dead_blocks(group, lost))]
            kept[name] = units
        layers = self.layers[~np.isin(self.layers, sorted(gone))]
        return replace(self, kept=kept, layers=layers)

    def removal(self) -> dict[str, IntArray]:
        """Return all that was removed so far, in dense numbering, ready for a Plan."""
        total: dict[str, IntArray] = {}
        for name, kept in self.kept.items():
            group = self.groups[name]
            units = np.setdiff1d(np.arange(group.size, dtype=np.int64), kept)
            parent = parent_of(group)
            if group.blocks is not None and parent is not None and parent in self.kept:
                # Query heads of a key-value head that is gone went with it.
                units = units[np.isin(group.blocks[units], self.kept[parent])]
            if len(units):
                total[name] = units
        return total

    def _current_name(self, group: Group) -> str:
        if group.layer is None:
            return group.name
        place = int(np.searchsorted(self.layers, group.layer))
        parts = group.name.split(".")
        if str(group.layer) in parts:
            parts[parts.index(str(group.layer))] = str(place)
        return ".".join(parts)


def count_layers(groups: Iterable[Group]) -> int:
    """Return the number of decoder layers."""
    return max((_last_layer(group) + 1 for group in groups), default=0)


def _last_layer(group: Group) -> int:
    if group.kind == "layers":
        return int(layer_numbers(group).max(initial=-1))
    return -1 if group.layer is None else group.layer
