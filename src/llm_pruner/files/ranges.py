"""Unit indices as text: ``"3,17,40-44"``, both ends included."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from llm_pruner.errors import UserError
from llm_pruner.types import IntArray

MOST_UNITS = 2**20
"""No group has more units; bounds what a text may name where the group is not known."""

_ITEM = re.compile(r"([0-9]{1,18})(?:\s*-\s*([0-9]{1,18}))?")


def parse_ranges(text: str, size: int | None = None) -> IntArray:
    """Return the sorted units that ``text`` names; an empty text names none.

    Args:
        text: comma-separated numbers and ranges in any order, such as ``"3,17,40-44"``.
        size: number of units there are; a unit outside 0..size-1 is refused if given.

    Raises:
        UserError: malformed, out of range, or a unit that occurs twice.
    """
    end = MOST_UNITS if size is None else size
    parts: list[IntArray] = []
    for item in text.split(",") if text.strip() else []:
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise UserError(
                f"{item.strip()[:40]!r} is not a unit or a range; write such as '3,17,40-44'"
            )
        start, stop = int(match[1]), int(match[2] or match[1])
        if stop < start:
            raise UserError(f"range {item.strip()} runs backwards; write {stop}-{start}")
        if stop >= end:
            raise UserError(f"unit {stop} is out of range; there are {end} units, 0 to {end - 1}")
        parts.append(np.arange(start, stop + 1, dtype=np.int64))
    units = np.sort(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)
    twice = np.unique(units[1:][units[1:] == units[:-1]])
    if len(twice):
        raise UserError(f"duplicate units {format_ranges(twice[:20])}; name each unit once")
    return units


def format_ranges(units: IntArray | Sequence[int]) -> str:
    """Return sorted unique units as text; runs of two and more become ranges."""
    if len(units) == 0:
        return ""
    runs = np.split(units, np.flatnonzero(np.diff(units) != 1) + 1)
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
