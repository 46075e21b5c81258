"""What a removal leaves of each layer, as plain data for tables and JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_pruner.planning.constraints import NONE, dead_blocks, removed_layers
from llm_pruner.planning.numbering import count_layers
from llm_pruner.types import Discovery, Group, Removal


@dataclass(frozen=True)
class Row:
    """One decoder layer, or the groups that span all layers.

    Attributes:
        layer: number in the dense model; None for groups that span all layers.
        removed: the layer goes whole.
        sizes: short group name (``heads``, ``ffn``) -> (kept, dense) number of units.
    """

    layer: int | None
    removed: bool = False
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


def explain(discovery: Discovery, removal: Removal) -> list[Row]:
    """Return one row per decoder layer, before them one for the groups that span all layers."""
    gone = removed_layers({group.name: group for group in discovery.groups}, removal)
    rows: dict[int | None, Row] = {
        layer: Row(layer, removed=layer in gone)
        for layer in [None, *range(count_layers(discovery.groups))]
    }
    for group in discovery.groups:
        kept = 0 if group.layer in gone else _kept(group, removal)
        rows[group.layer].sizes[_short(group)] = (kept, group.size)
    return [row for row in rows.values() if row.layer is not None or row.sizes]


def _kept(group: Group, removal: Removal) -> int:
    lost = set(removal.get(group.name, NONE).tolist())
    if group.blocks is not None:
        dead = set(dead_blocks(group, removal).tolist())
        lost.update(unit for unit, block in enumerate(group.blocks.tolist()) if block in dead)
    return group.size - len(lost)


def _short(group: Group) -> str:
    """Return the name without the layer: ``layers.3.ffn`` is ``ffn``."""
    if group.layer is None:
        return group.name
    return group.name.split(f"{group.layer}.", 1)[-1]
