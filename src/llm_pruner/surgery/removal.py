"""What a removal leaves of every tensor: kept positions, shapes and parameter counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_pruner.errors import InfeasibleError
from llm_pruner.files.ranges import format_ranges
from llm_pruner.settings.options import near
from llm_pruner.types import Discovery, Group, IntArray, Removal


def unit_problems(group: Group, units: IntArray) -> list[str]:
    """Return every reason why a group cannot lose these units, in any order; empty if it can."""
    if len(units) == 0:
        return []
    if group.frozen is not None:
        return [f"cannot lose units: {group.frozen}"]
    if problems := _naming_problems(group, units):
        return problems
    left = group.size - len(units)
    if left == 0:
        return [f"removes all {group.size} units; at least one must stay"]
    if left < group.least:
        return [f"leaves {left} units; the model chooses {group.least} of them for every token"]
    if left % group.multiple:
        return [f"leaves {left} units; grouped products need a multiple of {group.multiple}"]
    return []


def _naming_problems(group: Group, units: IntArray) -> list[str]:
    problems: list[str] = []
    values, times = np.unique(units, return_counts=True)
    if np.any(times > 1):
        problems.append(f"duplicate units {format_ranges(values[times > 1])}")
    outside = values[(values < 0) | (values >= group.size)]
    if len(outside):
        shown = ", ".join(str(unit) for unit in outside[:5]) + (", ..." if len(outside) > 5 else "")
        problems.append(f"units out of range ({shown}); it has 0 to {group.size - 1}")
    return problems


def checked_removal(discovery: Discovery, removal: Mapping[str, Any]) -> dict[str, IntArray]:
    """Return a removal that a person wrote as one whose units are sorted arrays of integers.

    Whether the groups can lose these units is not looked at, see ``unit_problems``.

    Args:
        removal: group name -> units: integers in any collection, or a mask of shape (size,) that is
            true for those that go.
    """
    found: dict[str, IntArray] = {}
    for name, units in removal.items():
        if name not in discovery.by_name:
            close = near(str(name), discovery.by_name)
            raise InfeasibleError(f"{name} is no group of this model; {close}discover lists them")
        group = discovery.by_name[name]
        found[name] = _numbers(group, units)
        if problems := _naming_problems(group, found[name]):
            raise InfeasibleError(f"{name}: {'; '.join(problems)}")
    return found


def _numbers(group: Group, units: Any) -> IntArray:
    values = np.array(units.tolist() if hasattr(units, "tolist") else [*units])
    if values.dtype == bool and values.shape == (group.size,):
        return np.flatnonzero(values)
    if values.ndim == 1 and (values.dtype.kind in "iu" or not len(values)):
        return np.sort(values.astype(np.int64))
    raise InfeasibleError(
        f"{group.name}: units are whole numbers, such as [0, 3], or a mask of {group.size} truth "
        f"values, not {str(units)[:40]}"
    )


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
    """Return the number of parameters left, tied weights counted once.

    Args:
        removal: group name -> units, in any collection, or a mask; None for none.

    Raises:
        InfeasibleError: a group is unknown, or has no such units.
    """
    shapes = kept_shapes(discovery, checked_removal(discovery, {} if removal is None else removal))
    return sum(math.prod(shape) for shape in shapes.values())
