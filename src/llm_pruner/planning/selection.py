"""Which groups a selection prunes, and which layers may go."""

from __future__ import annotations

import numpy as np

from llm_pruner.errors import UserError
from llm_pruner.planning.numbering import Survivors, count_layers
from llm_pruner.planning.target import Selection
from llm_pruner.types import Discovery, Group, IntArray


def choose_groups(
    discovery: Discovery, selection: Selection, survivors: Survivors | None = None
) -> tuple[Group, ...]:
    """Return the groups that may lose units, in the order of the discovery.

    Frozen groups are left out as long as their structure has others. Protection and ranges count
    the layers of the dense model.

    Raises:
        UserError: a structure that the model lacks or that is frozen everywhere (with the reason),
            no layer left to prune, a range beyond the last layer or for what spans all layers.
    """
    survivors = survivors or Survivors.dense(discovery)
    total = count_layers(survivors.groups.values())
    chosen: set[str] = set()
    for structure in selection.structures:
        first, last = _layers(selection, structure, total)
        groups = [group for group in discovery.groups if group.kind == structure]
        if not groups:
            kinds = dict.fromkeys(g.kind for g in discovery.groups if g.kind != "value_dim")
            raise UserError(
                f"this model has no {structure} to prune; it has {', '.join(kinds) or 'nothing'}"
            )
        free = [group for group in groups if group.frozen is None]
        if not free:
            raise UserError(
                f"{structure} cannot be pruned in this model: {groups[0].frozen}; "
                f"leave {structure} out of the structures"
            )
        spans_all = structure != "layers" and all(group.layer is None for group in free)
        if structure in selection.layer_ranges and spans_all:
            raise UserError(
                f"{structure} spans all layers, so it takes no layer range; drop the range"
            )
        inside = [
            group
            for group in free
            if group.layer is None or first <= survivors.dense_layer(group.layer) <= last
        ]
        if not inside:
            raise UserError(
                f"no {structure} in layers {first} to {last} can be pruned; choose other layers"
            )
        chosen.update(group.name for group in inside)
    return tuple(group for group in discovery.groups if group.name in chosen)


def removable_layers(group: Group, selection: Selection, survivors: Survivors) -> IntArray:
    """Return the units of a ``layers`` group that are neither protected nor out of range."""
    dense = survivors.groups[survivors.dense_name(group.name)]
    kept = survivors.kept[dense.name]
    return np.flatnonzero(np.isin(kept, dense_removable_layers(dense, selection))).astype(np.int64)


def dense_removable_layers(dense: Group, selection: Selection) -> IntArray:
    """Return the same for the ``layers`` group of the dense model."""
    numbers = dense.layers
    first, last = _layers(selection, "layers", int(numbers.max()) + 1)
    return np.flatnonzero((numbers >= first) & (numbers <= last)).astype(np.int64)


def _layers(selection: Selection, structure: str, total: int) -> tuple[int, int]:
    """Return the first and last layer that a structure is pruned in."""
    if structure in selection.layer_ranges:
        first, last = selection.layer_ranges[structure]
        if last < first:
            raise UserError(f"layer range {structure}={first}-{last} runs backwards; swap its ends")
        if last >= total:
            raise UserError(
                f"layer range {structure}={first}-{last} goes past the last layer; "
                f"the model has {total} layers, 0 to {total - 1}"
            )
        return first, last
    first, last = selection.protect_first, total - 1 - selection.protect_last
    if last < first and total:
        raise UserError(
            f"protect_first={selection.protect_first} and protect_last={selection.protect_last} "
            f"cover all {total} layers, so nothing is left to prune; protect fewer"
        )
    return first, last
