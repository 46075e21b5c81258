"""What removals leave of a dense model: its numbering, and the units kept in each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from llm_pruner.planning.constraints import dead_blocks, removed_layers
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.types import Discovery, Group, IntArray, Layer, Removal


@dataclass(frozen=True)
class Numbering:
    """What is left of a dense model after some steps, by its numbers there and here.

    Attributes:
        groups: the groups of the dense model, by name.
        kept: dense group name -> dense units that are left, sorted; position i is unit i of the
            pruned model. Groups of layers that are gone are absent.
        layers: path of a list of decoder layers -> dense numbers of those that are left; position
            i is layer i of the pruned list.
        parameters: number of parameters of the dense model.
    """

    groups: Mapping[str, Group]
    kept: Mapping[str, IntArray]
    layers: Mapping[str, IntArray]
    parameters: int

    @classmethod
    def dense(cls, discovery: Discovery) -> Numbering:
        """Start from the dense model, of which everything is left."""
        return cls(
            groups=discovery.by_name,
            kept={g.name: np.arange(g.size, dtype=np.int64) for g in discovery.groups},
            layers={
                path: np.arange(length, dtype=np.int64)
                for path, length in count_layers(discovery.groups).items()
            },
            parameters=count_parameters(discovery),
        )

    @cached_property
    def names(self) -> dict[str, str]:
        """Name of each group that is left -> its dense name: layers are renumbered by then."""
        return {
            group.name_at(int(np.searchsorted(self.layers[group.path], group.layer or 0))): dense
            for dense, group in ((name, self.groups[name]) for name in self.kept)
        }

    @cached_property
    def lengths(self) -> dict[str, int]:
        """Path of each list of decoder layers -> how many the dense model has in it."""
        return count_layers(self.groups.values())

    @property
    def begun(self) -> bool:
        """Whether anything is gone."""
        return any(len(self.kept.get(one.name, ())) < one.size for one in self.groups.values())

    def matched(self, discovery: Discovery) -> Discovery:
        """Return the ``discovery`` of what is left, with groups whose units mean others frozen.

        Where one key-value head is left, for instance, the units are its query heads.
        """

        def same(group: Group) -> bool:
            dense = self.groups.get(self.names.get(group.name, ""))
            return (
                dense is not None
                and len(self.kept[dense.name]) == group.size
                and (dense.blocks is None) == (group.blocks is None)
                and (dense.owner is None) == (group.owner is None)
            )

        lists = {g.path: name for name, g in self.groups.items() if g.kind == "layers"}
        found = (
            replace(one, name=lists.get(one.path, one.name)) if one.kind == "layers" else one
            for one in discovery.groups
        )
        changed = "what is left of it is pruned by other units than the whole was"
        groups = tuple(
            one if one.frozen is not None or same(one) else replace(one, frozen=changed)
            for one in found
        )
        return replace(discovery, groups=groups)

    def to_dense(self, removal: Removal) -> dict[str, IntArray]:
        """Return the same removal in the names and numbers of the dense model."""
        return {
            self.names[name]: self.kept[self.names[name]][units] for name, units in removal.items()
        }

    def after(self, removal: Removal) -> Numbering:
        """Return what is left once ``removal``, in the numbering of the pruned model, is done."""
        lost = self.to_dense(removal)
        gone = removed_layers(self.groups, lost)
        kept: dict[str, IntArray] = {}
        for name, units in self.kept.items():
            group = self.groups[name]
            if group.place in gone:
                continue
            if name in lost:
                units = np.setdiff1d(units, lost[name])
            if group.blocks is not None:
                units = units[~np.isin(group.blocks[units], dead_blocks(group, lost))]
            kept[name] = units
        layers = {
            path: np.array([one for one in numbers if (path, one) not in gone], dtype=np.int64)
            for path, numbers in self.layers.items()
        }
        return replace(self, kept=kept, layers=layers)

    def removal(self) -> dict[str, IntArray]:
        """Return all that was removed so far, in dense numbering, ready for a Plan."""
        total: dict[str, IntArray] = {}
        for name, kept in self.kept.items():
            group = self.groups[name]
            units = np.setdiff1d(np.arange(group.size, dtype=np.int64), kept)
            owner = None if group.owner is None else self.kept.get(group.owner)
            if group.blocks is not None and owner is not None:
                # Query heads of a key-value head that is gone went with it.
                units = units[np.isin(group.blocks[units], owner)]
            if len(units):
                total[name] = units
        return total


def count_layers(groups: Iterable[Group]) -> dict[str, int]:
    """Return the number of decoder layers in each list, by its path."""
    lengths: dict[str, int] = {}
    for group in groups:
        last = int(group.layers.max(initial=-1)) if group.kind == "layers" else group.layer
        lengths[group.path] = max(lengths.get(group.path, 0), 0 if last is None else last + 1)
    return lengths


def explain(discovery: Discovery, removal: Removal) -> list[Layer]:
    """Return one row per decoder layer, before them one for the groups that span all layers.

    Layers of the same number of several lists share a row.
    """
    left = Numbering.dense(discovery).after(removal)
    rows: dict[int | None, Layer] = {None: Layer(None)}
    lists = {g.path for g in discovery.groups if g.kind == "layers"} or {*left.layers}
    for layer in range(max(left.lengths.values(), default=0)):
        having = [left.layers[path] for path in lists if layer < left.lengths[path]]
        removed = bool(having) and not any(layer in one for one in having)
        rows[layer] = Layer(layer, removed=removed)
    for group in discovery.groups:
        rows[group.layer].sizes[group.label] = (len(left.kept.get(group.name, ())), group.size)
    return [row for row in rows.values() if row.layer is not None or row.sizes]
