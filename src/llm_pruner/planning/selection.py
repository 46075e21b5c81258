"""What is asked for: how much to remove (`Target`), where from (`Selection`), and which groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np

from llm_pruner.errors import UserError
from llm_pruner.planning.numbering import Numbering
from llm_pruner.settings.words import STRUCTURES, known_structure
from llm_pruner.types import Discovery, Group, IntArray, bound_to

Scope = Literal["local", "global"]

_KINDS = ("unit_ratio", "ratio", "params", "kv_cache")


@dataclass(frozen=True)
class Target:
    """How much to remove: exactly one of the first four is set.

    Attributes:
        unit_ratio: share of units to remove in each chosen layer, in (0, 1) (LLM-Pruner, arXiv
            2305.11627). A group of n units loses floor(n * unit_ratio).
        ratio: share of all parameters of the dense model to remove, in (0, 1).
        params: number of parameters to keep.
        kv_cache: share of what the dense model's cache grows by with each token to remove, in
            (0, 1).
        loose: take the nearest that can be reached, also nothing (between several steps).

    Raises:
        UserError: none or several are set, or what is set is no such number.
    """

    unit_ratio: float | None = None
    ratio: float | None = None
    params: int | None = None
    kv_cache: float | None = None
    loose: bool = False

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            raise UserError(
                f"the target needs exactly one of {', '.join(_KINDS)}; got {str(self) or 'none'}"
            )
        ((name, value),) = given.items()
        if value <= 0 or (name != "params" and value >= 1):
            what = "number to keep" if name == "params" else "share to remove, in (0, 1)"
            raise UserError(f"{name}={value} is no {what}")

    def _given(self) -> dict[str, float]:
        values = {name: getattr(self, name) for name in _KINDS}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._given().items())

    def kept(self, dense: int) -> int:
        """Return how much to keep of ``dense`` parameters, or bytes of cache per token.

        Raises UserError if ``params`` is not below ``dense``. Not for a ``unit_ratio``.
        """
        share = self.ratio if self.kv_cache is None else self.kv_cache
        if share is not None:
            return dense - round(dense * exact(share))
        assert self.params is not None
        if self.params >= dense:
            raise UserError(
                f"params={self.params:,} is not below the {dense:,} parameters of the "
                "model; give the smaller number to keep"
            )
        return self.params


@dataclass(frozen=True)
class Selection:
    """Which units compete, and how.

    Attributes:
        structures: kinds to prune, of `STRUCTURES`, or one.
        scope: ``local`` ranks inside each group and takes the same share from each; ``global``
            ranks the units of all chosen groups together by importance per removed parameter.
        protect_first: decoder layers at the start that stay whole.
        protect_last: decoder layers at the end that stay whole.
        layer_ranges: structure -> (first, last) layer to prune, both included, counted from 0;
            replaces the protection for that structure.
        round_to: the number of units kept in a group of channels (ffn, hidden, head_dim, other)
            is a multiple of this, unless the group is left alone.
        heads_to: the same of key-value heads.
        split: structure -> its share of the parameters that are removed; None lets the ranking
            decide (``global``) or takes the same share of units everywhere (``local``).
        spread: with ``global``, no group loses more than this many times the average share of
            units, nor keeps less than one in this many of the average; None for no limit.
        uniform: groups of one structure keep the same number of units in all layers; with ``local``
            and without protection or ranges.

    Raises:
        UserError: a structure is unknown, or the split gives them no shares of 1.
    """

    structures: tuple[str, ...]
    scope: Scope = "local"
    protect_first: int = 0
    protect_last: int = 0
    layer_ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    round_to: int = 1
    heads_to: int = 1
    split: Mapping[str, float] | None = None
    spread: float | None = None
    uniform: bool = False

    def __post_init__(self) -> None:
        given: object = self.structures
        names = (given,) if isinstance(given, str) else tuple(self.structures)
        object.__setattr__(self, "structures", tuple(dict.fromkeys(map(known_structure, names))))
        if not self.structures:
            raise UserError(f"no structures given; choose from {', '.join(STRUCTURES)}")
        shares = [*(self.split or {}).values()]
        if self.split is not None and (
            {*self.split} != {*self.structures} or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6
        ):
            shown = ", ".join(f"{name}={share:g}" for name, share in self.split.items())
            raise UserError(
                f"split {shown}: give each of {', '.join(self.structures)}, and nothing else, a "
                "share from 0 to 1; together they must be 1"
            )
        protects = self.protect_first > 0 or self.protect_last > 0
        if self.uniform and (self.scope != "local" or self.layer_ranges or protects):
            raise UserError(
                "uniform layers need scope local and no protected layers or layer ranges; drop "
                "these or uniform"
            )


def exact(ratio: float) -> Fraction:
    """Return the decimal number that a user wrote: 0.29 is 29/100, not the nearest double."""
    return Fraction(repr(float(ratio)))


def step_targets(dense_params: int, target: Target, steps: int) -> list[Target]:
    """Return the cumulative target of each step, linear in what is removed."""

    def part(step: int) -> Target:
        if target.unit_ratio is not None:
            return Target(unit_ratio=float(exact(target.unit_ratio) * step / steps), loose=True)
        if target.kv_cache is not None:
            return Target(kv_cache=float(exact(target.kv_cache) * step / steps), loose=True)
        removed = dense_params - target.kept(dense_params)
        return Target(params=dense_params - removed * step // steps, loose=True)

    return [*map(part, range(1, steps)), target]


def choose_groups(
    discovery: Discovery, selection: Selection, numbering: Numbering | None = None
) -> tuple[Group, ...]:
    """Return the groups that may lose units, in the order of the discovery.

    Protection and ranges count the layers of the dense model. Once something is gone, a structure
    of which nothing is left to prune has done its part.
    """
    numbering = numbering or Numbering.dense(discovery)
    lists = sum(group.kind == "layers" for group in discovery.groups)
    if "layers" in selection.structures and len(selection.structures) > 1 < lists:
        raise UserError(
            f"this model has {lists} lists of layers, in which a number stands for different "
            "layers; prune layers in a run of their own (--structures layers)"
        )
    chosen: set[str] = set()
    for structure in selection.structures:
        try:
            groups = _groups_of(structure, discovery, selection, numbering)
        except UserError as error:
            if not numbering.begun:
                raise
            done = error
        else:
            chosen.update(group.name for group in groups)
    if not chosen:
        raise done
    return tuple(group for group in discovery.groups if group.name in chosen)


def _groups_of(
    structure: str, discovery: Discovery, selection: Selection, numbering: Numbering
) -> list[Group]:
    groups = [group for group in discovery.groups if group.kind == structure]
    if not groups:
        kinds = dict.fromkeys(g.kind for g in discovery.groups if g.kind != "value_dim")
        raise UserError(
            f"this model has no {structure} to prune; it has {', '.join(kinds) or 'nothing'} "
            f"(llm-pruner inspect lists what is frozen, and why)"
        )
    free = [group for group in groups if group.frozen is None]
    if not free:
        raise UserError(
            f"{structure} cannot be pruned in this model: {groups[0].frozen}; "
            f"leave {structure} out of the structures"
        )
    inside = [group for group in free if _can_lose(group, selection, numbering)]
    if not inside:
        total = max(numbering.lengths.values(), default=0)
        first, last = _layers(selection, structure, total)
        raise UserError(
            f"no {structure} in layers {first} to {last} of {total} can be pruned; choose other "
            "layers, or protect fewer"
        )
    names, by_name = {group.name for group in inside}, {group.name: group for group in free}
    for group in inside:
        for other in bound_to(group.name, by_name).keys() - names:
            raise UserError(
                f"{group.name} loses the same units as {other}, which is not among the layers to "
                f"prune; choose all layers (--set protect_first=0 --set protect_last=0), or leave "
                f"{structure} out of the structures"
            )
    return inside


def scored_groups(discovery: Discovery, selection: Selection, numbering: Numbering) -> set[str]:
    """Return the names of groups that may lose units, and of those that lose some with them."""
    chosen = choose_groups(discovery, selection, numbering)
    return {name for group in chosen for name in bound_to(group.name, discovery.by_name)}


def _can_lose(group: Group, selection: Selection, numbering: Numbering) -> bool:
    if group.kind == "layers":
        dense = numbering.groups[numbering.names[group.name]]
        return len(removable_layers(dense, selection, numbering)) > 0
    if group.layer is None:
        return True
    first, last = _layers(selection, group.kind, numbering.lengths[group.path])
    return first <= int(numbering.layers[group.path][group.layer]) <= last


def removable_layers(dense: Group, selection: Selection, numbering: Numbering) -> IntArray:
    """Return the units of the dense ``layers`` that are neither protected nor out of range."""
    numbers = dense.layers
    first, last = _layers(selection, "layers", numbering.lengths[dense.path])
    return np.flatnonzero((numbers >= first) & (numbers <= last)).astype(np.int64)


def _layers(selection: Selection, structure: str, total: int) -> tuple[int, int]:
    unprotected = selection.protect_first, total - 1 - selection.protect_last
    return selection.layer_ranges.get(structure, unprotected)
