"""Widths by purpose: multiples that what runs the model wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import numpy as np

from llm_pruner.errors import UserError
from llm_pruner.planning.candidates import CHANNELS
from llm_pruner.planning.match_target import TOLERANCE
from llm_pruner.planning.selection import Scope, Selection, choose_groups
from llm_pruner.settings.prune import PURPOSES
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.types import Discovery, Group

_FINEST = 4
"""Sizes, at least, that a multiple must leave a group to choose from."""

_SMALL = 8
"""A multiple that nobody asked for is at most this part of the largest one that would do."""


def largest_multiple(discovery: Discovery, groups: Sequence[Group], scope: Scope) -> float:
    """Return the largest multiple that leaves enough sizes."""
    if not groups:
        return 0
    total = count_parameters(discovery)
    steps = []
    for kind in {group.kind for group in groups}:
        same = [group for group in groups if group.kind == kind]
        moving = same if scope == "local" else same[:1]
        one = {group.name: np.zeros(1, np.int64) for group in moving}
        steps.append(total - count_parameters(discovery, one))
    # Rounding is off by half a multiple at most; the finest kind makes up for the others.
    fine = 2 * TOLERANCE * total / max(1, min(steps))
    return min(fine, min(group.size for group in groups) / _FINEST)


def rounded_for(purpose: str, discovery: Discovery, selection: Selection) -> Selection:
    """Return a selection that keeps widths as a purpose wants them.

    ``blocks`` is 32 where all groups have such sizes and it is a small step, else 1; ``gguf`` is
    256 where enough sizes are left, else 32. Inputs of heads follow, too.
    """
    chosen = choose_groups(discovery, selection)
    if purpose != "blocks" and any(group.kind == "query_heads" for group in chosen):
        raise UserError(
            f"--round-to {purpose} needs whole heads; leave query_heads out of --structures, or "
            "use --round-to blocks"
        )
    if purpose.startswith("tp"):
        devices = int(purpose[2:])
        _check_divides(discovery, chosen, devices)
        return replace(selection, round_to=devices, heads_to=devices)
    channels = [group for group in chosen if group.kind in CHANNELS]
    most = largest_multiple(discovery, channels, selection.scope)

    def fits(multiple: int, part: int = 1) -> bool:
        return part * multiple <= most and all(group.size % multiple == 0 for group in channels)

    multiple = PURPOSES[purpose]
    if purpose == "blocks":
        return replace(selection, round_to=multiple if fits(multiple, _SMALL) else 1)
    if purpose == "gguf" and not fits(multiple):
        multiple = PURPOSES["blocks"]
    heads = [_heads_to(group, multiple) for group in chosen if group.kind == "heads"]
    return replace(selection, round_to=multiple, heads_to=max(heads, default=1))


def _heads_to(group: Group, multiple: int) -> int:
    """Return how many heads make a multiple of what reads them; 1 if all of them make none."""
    widths = [member.index.shape[1] for member in group.members if member.dim == 1]
    inputs = max(widths, default=multiple)
    step = multiple // gcd(multiple, inputs)
    return step if group.size % step == 0 else 1


def undivided(groups: Sequence[Group], devices: int) -> Group | None:
    """Return the first group of FFN channels, or heads, that devices cannot share evenly.

    Servers copy key-value heads, if their number divides the devices', and no query heads.
    """
    shared = {group.owner for group in groups if group.kind == "query_heads"}
    uneven = [
        group
        for group in groups
        if group.size % devices and (group.name not in shared or devices % group.size)
    ]
    channels = [group for group in uneven if group.kind == "ffn"]
    heads = [group for group in uneven if group.kind in ("heads", "query_heads")]
    return next(iter(channels + heads), None)


def _check_divides(discovery: Discovery, chosen: Sequence[Group], devices: int) -> None:
    heads = [group for group in chosen if group.kind == "heads" and group.size % devices]
    group = undivided(discovery.groups, devices)
    if group is not None:
        raise UserError(
            f"{group.name} has {group.size} units, which do not divide by {devices}; round for "
            "another number of devices"
        )
    if heads:
        raise UserError(
            f"{heads[0].name} has {heads[0].size} units, which do not divide by {devices}; leave "
            "heads out of the structures, or round for another number of devices"
        )
