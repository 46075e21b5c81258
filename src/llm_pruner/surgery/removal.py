"""What a removal leaves of every tensor: kept positions, shapes and parameter counts."""

from __future__ import annotations

import math

import numpy as np

from llm_pruner.files.ranges import format_ranges
from llm_pruner.types import Discovery, Group, IntArray, Removal


def unit_problems(group: Group, units: IntArray) -> list[str]:
    """Return every reason why a group cannot lose these units, in any order; empty if it can."""
    if len(units) == 0:
        return []
    if group.frozen is not None:
        return [f"cannot lose units: {group.frozen}"]
    problems: list[str] = []
    values, times = np.unique(units, return_counts=True)
    if np.any(times > 1):
        problems.append(f"duplicate units {format_ranges(values[times > 1])}")
    outside = values[(values < 0) | (values >= group.size)]
    left = group.size - len(values)
    if len(outside):
        shown = ", ".join(str(unit) for unit in outside[:5]) + (", ..." if len(outside) > 5 else "")
        problems.append(f"units out of range ({shown}); it has 0 to {group.size - 1}")
    elif left == 0:
        problems.append(f"removes all {group.size} units; at least one must stay")
    elif left < group.least:
        problems.append(
            f"leaves {left} units, but the model chooses {group.least} of them for every token; "
            f"keep at least {group.least}"
        )
    elif left % group.multiple:
        problems.append(
            f"leaves {left} units, but the model's grouped products need a multiple of "
            f"{group.multiple}; remove more or fewer"
        )
    return problems


def removed_positions(discovery: Discovery, removal: Removal) -> dict[tuple[str, int], IntArray]:
    """Return (tensor, dim) -> sorted positions that the removal deletes along that axis."""
    found: dict[tuple[str, int], list[IntArray]] = {}
    for name, units in removal.items():
        if len(units) == 0:
            continue
        for member in discovery.group(name).members:
            found.setdefault((member.tensor, member.dim), []).append(member.index[units].ravel())
    return {axis: np.unique(np.concatenate(parts)) for axis, parts in found.items()}


def removed_modules(discovery: Discovery, removal: Removal) -> tuple[str, ...]:
    """Return the qualified names of the modules that are removed whole (layers)."""
    return tuple(
        group.modules[int(unit)]
        for group, units in ((discovery.group(name), units) for name, units in removal.items())
        for unit in (units if group.modules else ())
    )


def kept_shapes(discovery: Discovery, removal: Removal) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter after the removal, by its dense name.

    Parameters of removed layers are absent.
    """
    gone = tuple(f"{module}." for module in removed_modules(discovery, removal))
    deleted = removed_positions(discovery, removal)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in discovery.shapes.items():
        if not name.startswith(gone):
            shapes[name] = tuple(
                size - len(deleted.get((name, dim), ())) for dim, size in enumerate(shape)
            )
    return shapes


def count_parameters(discovery: Discovery, removal: Removal | None = None) -> int:
    """Return the number of parameters left, tied weights counted once."""
    shapes = kept_shapes(discovery, removal or {})
    return sum(math.prod(shape) for shape in shapes.values())
